"""From pictures to what the encoders and the attention take, and from the decoder back to pictures.

Axis letters: H, W pixels; i image tokens, row-major; s subjects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from dynaip_jax.errors import UserError

# openai/clip `clip.py`, `_transform`; the colour is the mean in 8 bits, which is 0 after normalisation.
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
NEUTRAL = (123, 117, 104)
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


class Encoder(NamedTuple):
    """What an encoder of pictures wants of colours: they become (x / 255 - `mean`) / `std`; `neutral`: the colour that becomes 0."""

    mean: Any
    std: Any
    neutral: tuple[int, int, int]


ENCODERS = {  # by the names of bundles' components
    "clip_vision": Encoder(CLIP_MEAN, CLIP_STD, NEUTRAL),
    "siglip": Encoder(np.float32(0.5), np.float32(0.5), (128, 128, 128)),  # transformers `SiglipImageProcessor`
}


def mask_to_tokens(mask: Float[np.ndarray, "H W"], patch: int = 16) -> Float32[np.ndarray, " i"]:
    """The share of each image token that `mask` `[H, W]` covers: means over `patch` x `patch` pixels, float32 `[i]`.

    `patch` is the pixels a side of one token (such as 16: 8 in the autoencoder, 2 in packing). Raises `ValueError` if
    H or W is not a multiple of it.
    """
    height, width = mask.shape
    if height % patch or width % patch:
        raise ValueError(f"mask of {height} x {width}: expected multiples of {patch}")
    blocks = mask.reshape(height // patch, patch, width // patch, patch)
    return blocks.mean(axis=(1, 3), dtype=np.float32).reshape(-1)


def regions(masks: Sequence[Float[np.ndarray, "H W"]], patch: int = 16) -> Float32[np.ndarray, "s i"]:
    """Regions `[s, i]` float32 from one mask `[H, W]` a subject; where subjects overlap, their shares sum to 1."""
    shares = np.stack([mask_to_tokens(mask, patch) for mask in masks])
    return shares / np.maximum(shares.sum(axis=0), 1)


def square(
    image: UInt8[np.ndarray, "H W 3"], mode: Literal["pad", "crop"] = "pad", fill: tuple[int, int, int] | None = None
) -> UInt8[np.ndarray, "side side 3"]:
    """A square picture from uint8 `[H, W, 3]`: "pad" centres it on the colour `fill` (None: CLIP's mean colour), "crop"
    keeps its centre. Raises `ValueError` for another mode, and for a `fill` when cropping."""
    height, width = image.shape[:2]
    if mode == "crop" and fill is None:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return image[top : top + side, left : left + side]
    if mode == "pad":
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        canvas = np.empty((side, side, 3), np.uint8)
        canvas[:] = NEUTRAL if fill is None else fill
        canvas[top : top + height, left : left + width] = image
        return canvas
    raise ValueError(f"mode {mode!r}, fill {fill}: expected 'pad' with or without a fill, or 'crop' without")


def clip_pixels(
    image: UInt8[np.ndarray, "H W 3"], size: int = 224, mode: Literal["pad", "crop"] = "pad"
) -> Float32[np.ndarray, "{size} {size} 3"]:
    """CLIP's input float32 `[size, size, 3]` from uint8 `[H, W, 3]`: made square, resized, normalised.

    Source: `CLIPImageProcessor` of transformers: antialiased bicubic in 8 bits, then (x / 255 - mean) / std.
    """
    return encoder_pixels(image, size, mode, "clip_vision")


def encoder_pixels(
    image: UInt8[np.ndarray, "H W 3"], size: int, mode: Literal["pad", "crop", "stretch"], encoder: str
) -> Float32[np.ndarray, "{size} {size} 3"]:
    """The input float32 `[size, size, 3]` of one of `ENCODERS` from uint8 `[H, W, 3]`; see `clip_pixels`. "stretch" resizes a picture as
    it is, which is what `SiglipImageProcessor` does."""
    wanted = ENCODERS[encoder]
    if mode != "stretch":
        image = square(image, mode, wanted.neutral if mode == "pad" else None)
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return (np.asarray(resized, np.float32) / 255 - wanted.mean) / wanted.std


def centre_pixels(
    image: UInt8[np.ndarray, "H W 3"], resize: int, crop: int, mean: np.ndarray, std: np.ndarray
) -> Float32[np.ndarray, "{crop} {crop} 3"]:
    """The middle of a picture as measures read it, float32 `[crop, crop, 3]`: its shorter side resized to `resize` pixels, antialiased
    bicubic in 8 bits, the centre cut out, normalised.

    Source: `CLIPImageProcessor` and `BitImageProcessor` of transformers.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    size = [int(resize * side / short) for side in (width, height)]
    resized = Image.fromarray(image).resize((size[0], size[1]), Image.Resampling.BICUBIC)
    left, top = ((side - crop) // 2 for side in size)
    cut = np.asarray(resized, np.float32)[top : top + crop, left : left + crop]
    return (cut / 255 - mean) / std


def to_uint8(images: Any) -> UInt8[np.ndarray, "*shape"]:
    """8-bit pictures from float ones in [-1, 1] of any shape; values outside are clipped, halves go to the even number.

    Source: diffusers' `VaeImageProcessor`. Raises `UserError` for NaN or infinity.
    """
    x = np.asarray(images, np.float32)
    bad = x.size - np.count_nonzero(np.isfinite(x))
    if bad:
        raise UserError(
            f"output picture: {bad} of {x.size} values are NaN or infinite; expected numbers in [-1, 1]; "
            "check the weights for NaN, or compute in float32"
        )
    return np.round(np.clip(x / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
