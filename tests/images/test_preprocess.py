"""What encoders and attention take from pictures, and pictures from floats."""

import numpy as np
import pytest
import transformers
from PIL import Image
from skimage import data

from dynaip_jax import images
from dynaip_jax.errors import UserError


def test_mask_to_tokens_is_the_mean_of_each_patch_in_row_order():
    mask = np.zeros((32, 48), np.float32)
    mask[:16, 16:32] = 1  # token 1 of 6
    mask[16:20, 32:48] = 1  # a quarter of token 5
    np.testing.assert_array_equal(images.mask_to_tokens(mask), [0, 1, 0, 0, 0, 0.25])
    assert images.mask_to_tokens(mask, patch=8).shape == (24,)
    with pytest.raises(ValueError, match="40 x 48: expected multiples of 16"):
        images.mask_to_tokens(np.zeros((40, 48), np.float32))


def test_regions_share_what_overlaps_and_keep_the_rest():
    left, right, soft = (np.zeros((16, 64), np.float32) for _ in range(3))
    left[:, :32], right[:, 16:48], soft[:, 32:] = 1, 1, 0.25
    region = images.regions([left, right, soft])
    assert region.shape == (3, 4) and region.dtype == np.float32
    expected = [[1, 0.5, 0, 0], [0, 0.5, 0.8, 0], [0, 0, 0.2, 0.25]]
    np.testing.assert_allclose(region, expected, rtol=1e-6)
    np.testing.assert_array_equal(images.regions([soft]), [images.mask_to_tokens(soft)])


def test_pad_keeps_the_whole_picture_in_the_middle(photo):
    out = images.square(photo)
    assert out.shape == (451, 451, 3)
    np.testing.assert_array_equal(out[75:375], photo)
    assert (out[:75] == (123, 117, 104)).all() and (out[375:] == (123, 117, 104)).all()
    tall = images.square(np.ascontiguousarray(photo.swapaxes(0, 1)), "pad", fill=(1, 2, 3))
    np.testing.assert_array_equal(tall[:, 75:375], photo.swapaxes(0, 1))
    assert (tall[:, :75] == (1, 2, 3)).all()


def test_crop_keeps_the_centre(photo):
    np.testing.assert_array_equal(images.square(photo, "crop"), photo[:, 75:375])


def test_square_takes_no_other_mode(photo):
    with pytest.raises(ValueError, match="'stretch'"):
        images.square(photo, "stretch")
    with pytest.raises(ValueError, match="'crop'"):
        images.square(photo, "crop", fill=(0, 0, 0))


@pytest.mark.parametrize("size", [224, 336])
@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_clip_pixels_are_those_of_transformers(name, size):
    """Tolerance 1e-5 on values of about 2: the resized bytes must be the same, the rest is float32 rounding."""
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor  # 5.x, 4.57
    theirs = kind(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    image = images.square(getattr(data, name)())
    expected = np.moveaxis(np.asarray(theirs(Image.fromarray(image))["pixel_values"][0]), 0, -1)
    ours = images.clip_pixels(image, size)
    assert ours.dtype == np.float32 and ours.shape == (size, size, 3)
    assert np.abs(ours - expected).max() <= 1e-5


def test_siglip_pixels_are_those_of_transformers(photo):
    kind = getattr(transformers, "SiglipImageProcessorPil", None) or transformers.SiglipImageProcessor
    theirs = kind(size={"height": 384, "width": 384})(Image.fromarray(photo))["pixel_values"][0]
    ours = images.encoder_pixels(photo, 384, "stretch", "siglip")
    assert np.abs(ours - np.moveaxis(np.asarray(theirs), 0, -1)).max() <= 1e-5
    assert np.abs(images.encoder_pixels(photo, 384, "pad", "siglip")[:50]).max() < 0.01


def test_padding_is_neutral_to_clip_and_cropping_is_without(photo):
    padded = images.clip_pixels(photo, mode="pad")
    assert np.abs(padded[:30]).max() < 0.01 < np.abs(padded[100]).max()
    np.testing.assert_array_equal(images.clip_pixels(photo, mode="crop"), images.clip_pixels(photo[:, 75:375]))


def test_to_uint8_inverts_eight_bits_and_rounds_halves_to_even(photo):
    np.testing.assert_array_equal(images.to_uint8(photo.astype(np.float32) / 127.5 - 1), photo)
    np.testing.assert_array_equal(images.to_uint8([-7, -1, 1, 7]), [0, 0, 255, 255])
    np.testing.assert_array_equal(images.to_uint8([0.0, 0.01]), [128, 129])  # 127.5 and 128.775
    np.testing.assert_array_equal(images.to_uint8([0.0078]), [128])  # 128.4945
    for bad in (np.nan, np.inf):
        with pytest.raises(UserError, match="1 of 2 values are NaN or infinite"):
            images.to_uint8([0.0, bad])
