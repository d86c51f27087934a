"""Pictures in and out, in NumPy and PIL: nothing in here imports JAX."""

from dynaip_jax.images.files import read_settings
from dynaip_jax.images.grids import cell, grid, labelled
from dynaip_jax.images.masks import Mask, load_mask, read_mask
from dynaip_jax.images.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    NEUTRAL,
    centre_pixels,
    clip_pixels,
    encoder_pixels,
    mask_to_tokens,
    regions,
    square,
    to_uint8,
)
from dynaip_jax.images.reading import (
    FORMATS,
    KINDS,
    MAX_PIXELS,
    MIN_SIDE,
    digest,
    load_image,
    load_images,
    named,
    several,
)
from dynaip_jax.images.writing import Kept, check_png_path, keep_png, save_png

__all__ = [
    "CLIP_MEAN", "CLIP_STD", "FORMATS", "IMAGENET_MEAN", "IMAGENET_STD", "KINDS", "Kept", "MAX_PIXELS", "MIN_SIDE", "Mask", "NEUTRAL", "cell", "centre_pixels", "check_png_path", "clip_pixels",
    "digest", "encoder_pixels", "grid", "keep_png", "labelled", "load_image", "load_images", "load_mask", "mask_to_tokens", "named", "read_mask",
    "read_settings", "regions", "save_png", "several", "square", "to_uint8",
]  # fmt: skip
