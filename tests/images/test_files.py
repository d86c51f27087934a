"""Picture files, with scikit-image's photographs."""

import json
import os
import stat
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from skimage import data

from dynaip_jax import images
from dynaip_jax.errors import UserError


def saved(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def png_header(path, width, height):
    """A PNG that promises `width` x `height` pixels and holds none."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def refused(path, call=images.load_image, **options):
    """The message of the one-line error that names the file."""
    with pytest.raises(UserError) as caught:
        call(path, **options)
    message = str(caught.value)
    assert str(path) in message and "expected" in message and "\n" not in message
    return message


# --- reading


def test_plain_picture_is_read_as_it_is(tmp_path, photo):
    image = images.load_image(saved(tmp_path / "a.png", photo))
    assert image.dtype == np.uint8 and image.flags.writeable
    np.testing.assert_array_equal(image, photo)


@pytest.mark.parametrize("name", ["a.jpg", "a.mpo", "a.webp", "a.tiff", "a.bmp", "a.ppm", "a.gif"])
def test_every_format(tmp_path, photo, name):
    frames = dict(save_all=True, append_images=[Image.new("RGB", (9, 9))]) if name == "a.mpo" else {}  # as phones write
    image = images.load_image(saved(tmp_path / name, photo, **frames))
    assert image.shape == photo.shape
    assert np.abs(image.astype(int) - photo).mean() < 6  # GIF has 256 colours, JPEG and WebP lose detail


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, photo, orientation):
    stored = {  # what a camera writes when the upright picture is `photo`; EXIF 2.3, tag 0x0112
        1: photo, 2: photo[:, ::-1], 3: photo[::-1, ::-1], 4: photo[::-1],
        5: photo.swapaxes(0, 1), 6: np.rot90(photo, 1), 7: photo[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(photo, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", np.ascontiguousarray(stored), exif=exif)
    np.testing.assert_array_equal(images.load_image(path), photo)


def test_transparency_is_laid_on_white(tmp_path, photo):
    alpha = np.full((*photo.shape[:2], 1), 255, np.uint8)
    alpha[:100], alpha[100:200] = 0, 128
    image = images.load_image(saved(tmp_path / "a.png", np.concatenate([photo, alpha], axis=-1)))
    assert (image[:100] == 255).all()
    half = photo[100:200] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(image[100:200] - half).max() <= 1
    np.testing.assert_array_equal(image[200:], photo[200:])


def test_palette_with_a_transparent_colour(tmp_path):
    picture = Image.new("P", (16, 16), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(1, (0, 0, 16, 8))
    picture.save(tmp_path / "a.png", transparency=0)
    image = images.load_image(tmp_path / "a.png")
    assert (image[:8] == (0, 0, 255)).all() and (image[8:] == 255).all()


def test_grey_16_bit_and_bilevel(tmp_path):
    grey = data.camera()
    wide = grey.astype(np.uint16) * 257
    for name, array in (("8.png", grey), ("16.png", wide), ("16.tiff", wide)):
        image = images.load_image(saved(tmp_path / name, array))
        np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=-1))
    steps = np.arange(0, 65536, 128, dtype=np.uint16).reshape(16, 32)
    image = images.load_image(saved(tmp_path / "steps.png", steps))
    np.testing.assert_array_equal(image[..., 0], np.rint(steps / 257))
    Image.fromarray(grey > 127).save(tmp_path / "1.png")
    np.testing.assert_array_equal(images.load_image(tmp_path / "1.png")[..., 0], np.where(grey > 127, 255, 0))


def test_cmyk(tmp_path, photo):
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(images.load_image(tmp_path / "a.tiff"), photo)


@pytest.mark.parametrize("width, height", [(12_000, 10_000), (60_000, 60_000)])  # the second, PIL itself refuses
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_refused_before_decoding(tmp_path, width, height):
    message = refused(png_header(tmp_path / "bomb.png", width, height))
    assert "make it smaller" in message
    assert str(100_000_000) in message or str(width * height) in message


def test_pixel_limit(tmp_path, photo):
    path = saved(tmp_path / "a.png", photo)
    assert images.load_image(path, max_pixels=300 * 451).shape == photo.shape
    assert "451 x 300 pixels; expected at most 135299" in refused(path, max_pixels=300 * 451 - 1)


def test_smallest_picture(tmp_path):
    assert images.load_image(saved(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))).shape == (8, 8, 3)
    assert "9 x 7 pixels; expected at least 8" in refused(saved(tmp_path / "b.png", np.zeros((7, 9, 3), np.uint8)))


def test_what_is_no_picture(tmp_path):
    assert "no such file" in refused(tmp_path / "missing.png")
    assert "a folder" in refused(tmp_path)
    for name, content in (("empty.png", b""), ("text.png", b"a prompt\n"), ("a.npy", b"\x93NUMPY\x01\x00")):
        (tmp_path / name).write_bytes(content)
        assert "not a picture" in refused(tmp_path / name)
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")
    assert "not a picture" in refused(tmp_path / "a.eps")  # never handed to Ghostscript
    assert "32 bits" in refused(saved(tmp_path / "a.tiff", np.ones((16, 16), np.float32)))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff"])
def test_truncated_and_corrupt_files(tmp_path, photo, name):
    whole = saved(tmp_path / name, photo).read_bytes()
    broken = tmp_path / f"broken_{name}"
    for share in (0.02, 0.3, 0.6, 0.9):
        broken.write_bytes(whole[: int(len(whole) * share)])
        refused(broken)
    rng = np.random.default_rng(0)
    for _ in range(25):  # a flipped byte may go unseen by the format, but no other error comes out
        spoiled = bytearray(whole)
        for at in rng.integers(0, min(len(whole), 4000), 4):
            spoiled[at] ^= int(rng.integers(1, 256))
        broken.write_bytes(spoiled)
        try:
            assert images.load_image(broken).ndim == 3
        except UserError as e:
            assert str(broken) in str(e)


def test_reading_pictures_needs_no_jax():
    code = "import sys, dynaip_jax.images; sys.exit(any(m in sys.modules for m in ('jax', 'flax', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- masks


def half_mask(height, width):
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 255
    return mask


def test_mask_of_the_right_size(tmp_path):
    grey = half_mask(32, 64)
    grey[0, 0] = 51
    mask = images.load_mask(saved(tmp_path / "a.png", grey), 32, 64)
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, grey.astype(np.float32) / 255)


@pytest.mark.parametrize("height, width", [(16, 32), (64, 128), (100, 201)])
def test_mask_of_the_same_shape_is_resized(tmp_path, height, width):
    mask = images.load_mask(saved(tmp_path / "a.png", half_mask(height, width)), 32, 64)
    assert mask.shape == (32, 64) and mask.min() == 0 and mask.max() == 1
    np.testing.assert_allclose(mask[:, :30], 0, atol=1e-6)
    np.testing.assert_allclose(mask[:, 34:], 1, atol=1e-6)


def test_masks_that_do_not_fit(tmp_path):
    path = saved(tmp_path / "a.png", half_mask(100, 203))  # 1.5 % too wide
    message = refused(path, images.load_mask, height=32, width=64)
    assert "203 x 100 pixels" in message and "64 x 32" in message
    black = saved(tmp_path / "black.png", np.zeros((32, 64), np.uint8))
    assert "black everywhere" in refused(black, images.load_mask, height=32, width=64)
    assert "no such file" in refused(tmp_path / "no.png", images.load_mask, height=32, width=64)


def test_transparent_parts_are_outside_the_mask(tmp_path):
    alpha = half_mask(32, 64)
    path = saved(tmp_path / "a.png", np.stack([np.full_like(alpha, 255)] * 3 + [alpha], axis=-1))
    np.testing.assert_array_equal(images.load_mask(path, 32, 64), alpha / np.float32(255))


# --- writing


def test_png_carries_its_settings(tmp_path, photo):
    settings = {"prompt": 'a "cat", 猫\nin the snow', "seed": 7, "granularity": [0.2, 0.3, 0.5], "negative": None}
    path = tmp_path / "out.png"
    images.save_png(photo, path, settings)
    assert images.read_settings(path) == settings
    assert json.loads(Image.open(path).text["dynaip"]) == settings
    np.testing.assert_array_equal(images.load_image(path), photo)
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]
    (tmp_path / "touched").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "touched").stat().st_mode)


def test_nothing_is_overwritten_unasked(tmp_path, photo):
    path = tmp_path / "out.png"
    images.save_png(photo, path, {"seed": 1})
    before = path.read_bytes()
    assert "exists" in refused(path, lambda p: images.save_png(photo, p, {"seed": 2}))
    assert path.read_bytes() == before
    images.save_png(Image.fromarray(photo), path, {"seed": 2}, overwrite=True)
    assert images.read_settings(path) == {"seed": 2}


def test_a_failed_write_leaves_the_old_file_whole_and_no_other(tmp_path, photo, monkeypatch):
    path = tmp_path / "out.png"
    images.save_png(photo, path, {"seed": 1})

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    assert "No space left" in refused(path, lambda p: images.save_png(photo, p, {}, overwrite=True))
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"] and images.read_settings(path) == {"seed": 1}


def test_places_that_cannot_be_written(tmp_path, photo):
    def write(path):
        images.save_png(photo, path, {}, overwrite=True)

    assert "no folder" in refused(tmp_path / "missing" / "out.png", write)
    assert "expected .png" in refused(tmp_path / "out.jpg", write)
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in refused(tmp_path / "folder.png", write)


def test_settings_that_are_not_there(tmp_path, photo):
    assert "holds no settings" in refused(saved(tmp_path / "a.png", photo), images.read_settings)
    text = PngInfo()
    text.add_text("dynaip", "[1, 2")
    assert "holds no settings" in refused(saved(tmp_path / "b.png", photo, pnginfo=text), images.read_settings)
    assert "not a picture" in refused(saved(tmp_path / "c.jpg", photo), images.read_settings)
    assert "no such file" in refused(tmp_path / "d.png", images.read_settings)
