"""Records to arrays: decoding, augmentation, drops."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from dynaip_jax import images
from dynaip_jax.data import samples
from dynaip_jax.data.config import Bucket, DataConfig
from dynaip_jax.data.loader import make_loader
from dynaip_jax.data.records import open_dataset
from dynaip_jax.errors import UserError
from tests.data.photos import CAPTIONS, WordIds, config, make_dataset, take

PLAIN = dict(crop_reference=1.0, flip_reference=0.0, drop_image=0.0, drop_text=0.0, drop_both=0.0)
SQUARE = Bucket("1:1", 64, 64)


# --- one batch


def test_shapes_types_and_ranges(folder):
    loader = make_loader(config(folder), WordIds(), global_batch=4)
    seen = set()
    for batch in take(loader, 11):
        seen.add(batch.target.shape)
        assert batch.reference.shape == (4, 1, 32, 32, 3)
        assert {k: x.shape for k, x in batch.ids.items()} == dict(t5=(4, 8), clip_text=(4, 77))
        assert batch.keep_image.shape == batch.row.shape == (4,)
        assert [x.dtype for x in jax.tree.leaves(batch)] == [np.float32] * 2 + [np.int32] * 2 + [np.float32, np.int32]
        assert batch.target.min() >= -1 and batch.target.max() <= 1 and batch.target.std() > 0.2
    assert seen == {(4, 64, 64, 3), (4, 48, 80, 3)}


def test_pixels_against_pil(folder):
    dataset = open_dataset(folder)
    bucket = Bucket("3:2", 48, 80)
    batch = samples.Pictures(dataset, config(folder, **PLAIN), WordIds()).read(np.array([1, 2]), bucket, 0)
    for target, photo in zip(batch.target, (data.chelsea(), data.coffee()), strict=True):
        h, w = photo.shape[:2]
        wide, high = (w, w * 48 / 80) if w / h < 80 / 48 else (h * 80 / 48, h)
        left, top = (w - wide) / 2, (h - high) / 2
        resized = Image.fromarray(photo).resize((80, 48), Image.LANCZOS, (left, top, left + wide, top + high))
        np.testing.assert_allclose(target, np.asarray(resized) / 127.5 - 1, atol=1e-6)
    for reference, photo in zip(batch.reference, (data.chelsea(), data.rocket()), strict=True):
        np.testing.assert_array_equal(reference[0], images.clip_pixels(photo, 32))
    expected = WordIds().ids([CAPTIONS[n][0] for n in ("chelsea", "coffee")])
    assert batch.ids.keys() == expected.keys()
    for name, ids in expected.items():
        np.testing.assert_array_equal(batch.ids[name], ids)
    np.testing.assert_array_equal(batch.row, [1, 2])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (80, 48), (512, 512), (1024, 1024)])
def test_cover_keeps_the_centre_and_the_shape(height, width):
    photo = np.zeros((301, 451, 3), np.uint8)
    photo[150, :], photo[:, 225] = 255, 255  # a cross through the centre
    covered = samples.cover(photo, height, width)
    assert covered.shape == (height, width, 3)
    np.testing.assert_allclose(covered, covered[::-1, ::-1], atol=0.02)
    plain = samples.cover(np.full((301, 451, 3), 51, np.uint8), height, width)
    np.testing.assert_allclose(plain, 51 / 127.5 - 1, atol=1e-6)


def test_reference_may_be_cropped_square(folder):
    pictures = samples.Pictures(open_dataset(folder), config(folder, **PLAIN, square="crop"), WordIds())
    reference = pictures.read(np.array([1]), SQUARE, 0).reference
    np.testing.assert_array_equal(reference[0, 0], images.clip_pixels(data.chelsea(), 32, "crop"))


def test_background_is_removed_by_the_mask(tmp_path):
    dataset = open_dataset(make_dataset(tmp_path))
    target, reference = samples.pictures(dataset[1], "cat", remove_background=True)
    np.testing.assert_array_equal(target, data.chelsea())
    inside = np.zeros((300, 451), bool)
    inside[50:250, 100:350] = True
    np.testing.assert_array_equal(reference[inside], data.chelsea()[inside])
    assert (reference[~inside] == images.NEUTRAL).all()
    np.testing.assert_array_equal(samples.pictures(dataset[1], "cat", remove_background=False)[1], data.chelsea())
    with pytest.raises(UserError, match="astronaut: no mask"):
        samples.pictures(dataset[0], "astronaut", remove_background=True)


def test_a_half_covered_pixel_is_half_background(tmp_path):
    record = open_dataset(make_dataset(tmp_path))[1]
    grey = io.BytesIO()
    Image.fromarray(np.full((300, 451), 128, np.uint8)).save(grey, "PNG")
    reference = samples.pictures(record._replace(mask=grey.getvalue()), "cat", remove_background=True)[1]
    expected = (data.chelsea() * 128.0 + np.array(images.NEUTRAL) * 127.0) / 255
    assert np.abs(reference - expected).max() <= 0.51


def test_boxes_cut_both_pictures(tmp_path):
    record = open_dataset(make_dataset(tmp_path))[0]
    record = record._replace(target_box=np.array([0, 0, 100, 200]), reference_box=np.array([50, 60, 150, 260]))
    target, reference = samples.pictures(record, "astronaut", remove_background=False)
    np.testing.assert_array_equal(target, data.astronaut()[:100, :200])
    np.testing.assert_array_equal(reference, data.astronaut()[50:150, 60:260])


@pytest.mark.parametrize("box", [(0, 0, 513, 100), (0, 0, 100, 513), (500, 500, 400, 510), (-1, 0, 100, 100)])
def test_boxes_beyond_the_picture_are_told(tmp_path, box):
    record = open_dataset(make_dataset(tmp_path))[0]
    for field in ("target_box", "reference_box"):
        with pytest.raises(
            UserError, match=r"astronaut: box \[.*\] in a picture of 512 x 512 pixels; expected .* inside it"
        ):
            samples.pictures(record._replace(**{field: np.array(box)}), "astronaut", remove_background=False)


def test_a_mask_of_another_size_is_told(tmp_path):
    dataset = open_dataset(make_dataset(tmp_path))
    record = dataset[1]._replace(mask=dataset[0].target)
    with pytest.raises(UserError, match="cat: mask .512, 512., reference .300, 451.; expected one size"):
        samples.pictures(record, "cat", remove_background=True)


# --- augmentation and drops


def test_flips(folder):
    dataset = open_dataset(folder)

    def read(**changes):
        return samples.Pictures(dataset, config(folder, **PLAIN | changes), WordIds()).read(np.array([1]), SQUARE, 0)

    plain, reference, target = read(), read(flip_reference=1.0), read(flip_target=1.0)
    np.testing.assert_array_equal(reference.reference, plain.reference[:, :, :, ::-1])
    assert np.abs(reference.reference - plain.reference).max() > 0.5
    np.testing.assert_array_equal(reference.target, plain.target)
    np.testing.assert_array_equal(target.target, plain.target[:, :, ::-1])
    np.testing.assert_array_equal(target.reference, plain.reference)


@given(st.integers(8, 500), st.integers(8, 500), st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1))
def test_crop(height, width, area, down, along):
    place = np.stack(np.mgrid[:height, :width], axis=-1)
    part = samples.crop(place, area, down, along)
    h, w = part.shape[:2]
    assert abs(h - height * area**0.5) <= 1 and abs(w - width * area**0.5) <= 1
    np.testing.assert_array_equal(part[-1, -1] - part[0, 0], (h - 1, w - 1))
    assert abs(part[0, 0, 0] - (height - h) * down) <= 0.5 and abs(part[0, 0, 1] - (width - w) * along) <= 0.5


def test_crops_keep_at_least_the_share_asked_for():
    areas = [samples.draw(DataConfig(crop_reference=0.3), 0, row).crop[0] for row in range(2000)]
    assert 0.3 <= min(areas) < 0.31 and 0.99 < max(areas) <= 1
    assert samples.draw(DataConfig(crop_reference=1.0), 0, 0).crop[0] == 1


def test_drop_rates():
    chances = DataConfig(drop_image=0.1, drop_text=0.2, drop_both=0.05, flip_reference=0.3, flip_target=0.4)
    draws = [samples.draw(chances, epoch, row) for epoch in range(4) for row in range(5000)]
    n = len(draws)

    def rate(test):
        return sum(map(test, draws)) / n

    for measured, expected in (
        (rate(lambda d: d.drop_image and not d.drop_text), 0.1),
        (rate(lambda d: d.drop_text and not d.drop_image), 0.2),
        (rate(lambda d: d.drop_text and d.drop_image), 0.05),
        (rate(lambda d: d.flip_reference), 0.3),
        (rate(lambda d: d.flip_target), 0.4),
    ):
        assert abs(measured - expected) < 4 * (expected * (1 - expected) / n) ** 0.5
    assert samples.draw(chances, 1, 2) == samples.draw(chances, 1, 2)
    others = [(chances, 2, 2), (chances, 1, 3), (dataclasses.replace(chances, seed=1), 1, 2)]
    assert all(samples.draw(*other) != samples.draw(chances, 1, 2) for other in others)


def test_chances_do_not_depend_on_each_other():
    chances = DataConfig(drop_image=0.4, drop_text=0, drop_both=0, flip_reference=0.5, flip_target=0.5)
    draws = [samples.draw(chances, 0, row) for row in range(4000)]
    decisions = np.array([(d.drop_image, d.flip_reference, d.flip_target, *d.crop) for d in draws], float)
    assert np.abs(np.corrcoef(decisions.T) - np.eye(6)).max() < 0.08  # 5 standard deviations


def test_a_crop_reaches_the_batch(folder):
    chances = config(folder, **PLAIN | dict(crop_reference=0.3))
    batch = samples.Pictures(open_dataset(folder), chances, WordIds()).read(np.array([1]), SQUARE, 5)
    part = samples.crop(data.chelsea(), *samples.draw(chances, 5, 1).crop)
    assert part.shape != data.chelsea().shape
    np.testing.assert_array_equal(batch.reference[0, 0], images.clip_pixels(part, 32))


@pytest.mark.parametrize(
    ("drops", "image_kept", "text_kept"),
    [
        (dict(drop_image=1.0), False, True),
        (dict(drop_text=1.0), True, False),
        (dict(drop_both=1.0), False, False),
        ({}, True, True),
    ],
)
def test_drops_reach_the_batch(folder, drops, image_kept, text_kept):
    (batch,) = take(make_loader(config(folder, **PLAIN | drops), WordIds(), global_batch=4), 1)
    assert batch.keep_image.tolist() == [float(image_kept)] * 4
    for ids in (batch.ids["t5"], batch.ids["clip_text"]):
        assert ids.any(axis=1).tolist() == [text_kept] * 4
    assert np.abs(batch.reference).max() > 0.5  # the pixels stay: keep_image says what counts
