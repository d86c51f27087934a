"""What becomes of the pictures of a row."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage import data

from dynaip_jax.data import sources
from dynaip_jax.data.check import Limits
from dynaip_jax.errors import UserError
from tests.data.photos import checked, entries, pixels, write_lines


def test_other_formats_become_png_and_jpeg_stays(tmp_path):
    photo = Image.fromarray(data.chelsea())
    photo.save(tmp_path / "a.webp", lossless=True)
    photo.save(tmp_path / "a.jpg")
    line = dict(reference="a.jpg", target="a.webp", caption="a cat", subject="cat")
    (record,) = checked(sources.read_manifest(write_lines(tmp_path, [line])))
    assert record.target.startswith(b"\x89PNG") and record.reference == (tmp_path / "a.jpg").read_bytes()
    np.testing.assert_array_equal(pixels(record)[0], data.chelsea())


def test_a_turned_photograph_has_its_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(data.coffee()).save(tmp_path / "a.jpg", exif=exif)
    line = dict(reference="a.jpg", target="a.jpg", caption="a cup", subject="cup")
    (record,) = checked(sources.read_manifest(write_lines(tmp_path, [line])))
    assert record.target_box.tolist() == [0, 0, 600, 400]


def test_large_pictures_are_shrunk(tmp_path):
    Image.fromarray(data.rocket()).save(tmp_path / "rocket.jpg", quality=90)  # 427 x 640
    lines = entries(tmp_path)
    lines[0] |= dict(reference="rocket.jpg")
    records = checked(sources.read_manifest(write_lines(tmp_path, lines[:2])), Limits(shrink=150))
    astronaut, rocket = pixels(records[0])
    np.testing.assert_array_equal(
        astronaut, np.asarray(Image.fromarray(data.astronaut()).resize((150, 150), Image.LANCZOS))
    )
    assert rocket.shape == (150, 225, 3) and records[0].reference.startswith(b"\xff\xd8\xff")
    shrunk = np.asarray(Image.fromarray(data.rocket()).resize((225, 150), Image.LANCZOS))
    assert np.abs(rocket.astype(int) - shrunk).mean() < 3
    mask = np.asarray(Image.open(io.BytesIO(records[1].mask)))
    assert mask.shape == pixels(records[1])[0].shape[:2] == (150, 226)
    assert mask[25:125, 50:175].min() > 200 and mask[:23].max() < 50
    kept = checked(sources.read_manifest(write_lines(tmp_path, lines[:2])), Limits(shrink=300))[1]
    assert kept.target == (tmp_path / "chelsea.png").read_bytes()


@pytest.mark.parametrize(
    ("limits", "message"),
    [(dict(min_side=7), "`min_side` 7"), (dict(max_pixels=10), "`max_pixels` 10"), (dict(shrink=63), "`shrink` 63")],
)
def test_bad_limits(limits, message):
    with pytest.raises(UserError, match=message):
        Limits(**limits)
