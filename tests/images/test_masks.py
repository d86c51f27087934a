"""Masks in any form are one, and those that would hardly act are told."""

import io

import numpy as np
import pytest
from PIL import Image

from dynaip_jax import images
from dynaip_jax.errors import UserError

SOFT = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (32, 1))
HARD = np.where(np.arange(64) < 32, 255, 0).astype(np.uint8) * np.ones((32, 1), np.uint8)


def file_of(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_a_mask_in_any_form_is_one():
    import jax.numpy as jnp

    torch = pytest.importorskip("torch")
    unit = SOFT / np.float32(255)
    for way in (file_of(SOFT), io.BytesIO(file_of(SOFT)), Image.fromarray(SOFT), SOFT, unit, unit.astype(float), jnp.asarray(unit),
                torch.tensor(unit), torch.tensor(SOFT)):  # fmt: skip
        np.testing.assert_allclose(images.load_mask(way, 32, 64), unit, atol=1e-7)
    binary = HARD / np.float32(255)
    for way in (
        HARD > 0,
        HARD // 255,
        (HARD > 0).astype(int),
        Image.fromarray(HARD > 0),
        file_of(HARD),
        torch.tensor(HARD > 0),
    ):
        np.testing.assert_array_equal(images.load_mask(way, 32, 64), binary)
    np.testing.assert_array_equal(images.load_mask(HARD > 0, 64, 128), images.load_mask(file_of(HARD), 64, 128))
    assert images.read_mask(SOFT).notes == images.read_mask(HARD > 0).notes == ()


def test_a_file_of_zeros_and_ones_is_black_and_white_and_said():
    mask = images.read_mask(file_of(HARD // 255), "`masks` 1")
    np.testing.assert_array_equal(mask.fitted(32, 64), HARD / np.float32(255))
    assert mask.notes == ("`masks` 1: the mask holds 0 and 1 of 255 alone; they are read as black and white",)


def test_opacity_is_the_mask_of_what_shows_nothing_else():
    stencil = Image.new("RGBA", (64, 32), (0, 0, 0, 0))
    stencil.putalpha(Image.fromarray(SOFT))
    np.testing.assert_array_equal(images.load_mask(stencil, 32, 64), SOFT / np.float32(255))


@pytest.mark.parametrize(
    ("mask", "message"),
    (
        (HARD * 0, "the mask is black everywhere"),
        (Image.new("RGBA", (64, 32), (0, 0, 0, 255)), "the mask is black everywhere"),
        (HARD / -255, "the array holds floats from -1 to -?0; expected a mask of bool"),
        (HARD / 255 * 2, "the array holds floats from 0 to 2"),
        (HARD / 255 * np.nan, "the array holds NaN"),
        (HARD.astype(int), "an array of int64; expected a mask of bool, 0 and 1, uint8 or floats"),
        (np.dstack([HARD] * 3), r"a mask of shape \[32, 64, 3\]; expected \[h, w\]"),
        (HARD[:0], r"a mask of shape \[0, 64\]"),
        (HARD[:, :40], "a mask of 40 x 32 pixels for a picture of 64 x 32"),
        (Image.fromarray(np.dstack([HARD * 0, HARD * 0, HARD])), r"a mask in colour \(at most 0, 0, 255 of red, green, blue\)"),
        (Image.fromarray(np.dstack([HARD, HARD, HARD // 2])), r"a mask in colour \(at most 255, 255, 127"),
    ),
)  # fmt: skip
def test_masks_that_mean_something_else_are_named(mask, message):
    with pytest.raises(UserError, match=rf"^`masks` 1: {message}") as caught:
        images.read_mask(mask, "`masks` 1").fitted(32, 64)
    assert len(str(caught.value)) < 300


def test_nearly_empty_masks_are_told_by_their_mean():
    dot = HARD * 0
    dot[3, 3] = 255
    for mask, message in (
        (dot, "0.05% of the picture on average, 1.00 of 1 at most"),
        (file_of(dot), "0.05% of the picture on average"),
        (HARD / 255 * 0.2, "10.00% of the picture on average, 0.20 of 1 at most"),
    ):
        (note,) = images.read_mask(mask, "`masks` 1").notes
        assert note.startswith("`masks` 1: the mask is nearly empty: ") and message in note


def test_jpeg_masks_are_grey_enough():
    file = io.BytesIO()
    Image.fromarray(np.dstack([HARD] * 3)).save(file, "JPEG", quality=60)
    assert np.abs(images.load_mask(file, 32, 64) - HARD / 255).mean() < 0.05
