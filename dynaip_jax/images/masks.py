"""Masks: where in the output picture a subject may appear."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32
from PIL import Image

from dynaip_jax.errors import UserError
from dynaip_jax.images.arrays import as_array, is_array, unit
from dynaip_jax.images.reading import BLACK, MAX_PIXELS, decoded, laid_on, named

COLOURED = 48  # of 255: how far apart the channels of a mask may lie (JPEG moves them a little)
SMALL, FAINT = 0.01, 0.25  # a mask of less than this mean, or nowhere brighter than that, hardly acts
ARRAY = "bool, 0 and 1, uint8 or floats from 0 to 1"


class Mask(NamedTuple):
    """A mask as it was given: `values` float32 `[h, w]` in [0, 1], what errors call it, and lines worth showing."""

    values: np.ndarray
    name: str
    notes: tuple[str, ...] = ()

    def fitted(self, height: int, width: int) -> Float32[np.ndarray, "{height} {width}"]:
        """float32 `[height, width]`. Raises `UserError` if its aspect ratio differs by more than 1 %, or if it is black everywhere."""
        h, w = self.values.shape
        if min(h, w) < 1 or abs(w * height / (h * width) - 1) > 0.01:
            raise UserError(
                f"{self.name}: a mask of {w} x {h} pixels for a picture of {width} x {height}; "
                "expected that size, or another of the same aspect ratio; crop or pad the mask"
            )
        if self.values.max() == 0:
            raise UserError(
                f"{self.name}: the mask is black everywhere; expected the subject's region in white; paint it white"
            )
        if (h, w) == (height, width):
            return self.values
        resized = Image.fromarray(self.values).resize((width, height), Image.Resampling.BILINEAR)
        return np.clip(np.asarray(resized, np.float32), 0, 1)


def load_mask(source: Any, height: int, width: int) -> Float32[np.ndarray, "{height} {width}"]:
    """A region of the output picture, float32 `[height, width]` in [0, 1]: white inside, black or transparent outside.

    `source`: see `read_mask`. A mask of another size but the same shape (aspect ratio within 1 %) is resized. Raises `UserError` for
    what `read_mask` would refuse, for another shape, and for a mask that is black everywhere.
    """
    return read_mask(source).fitted(height, width)


def read_mask(source: Any, name: str = "mask") -> Mask:
    """A mask in any form that `load_image` takes, or an array `[h, w]`: bool, 0 and 1, uint8, or floats from 0 to 1.

    Where a picture is black or transparent everywhere, its opacity is the mask. `name`: what errors call it if it is no file.
    Raises `UserError` for a picture that `load_image` would refuse, one in colour, and an array of another shape or range.
    """
    name = named(source, name)
    notes = []
    if is_array(source):
        values = _of_array(as_array(source, name), name)
    else:
        grey = _grey(source, name)
        if grey.max(initial=0) == 1:
            notes.append(f"{name}: the mask holds 0 and 1 of 255 alone; they are read as black and white")
        values = grey.astype(np.float32) / (1 if notes else 255)
    mean, top = values.mean() if values.size else 0, values.max(initial=0)
    if 0 < mean < SMALL or 0 < top < FAINT:
        notes.append(
            f"{name}: the mask is nearly empty: {mean:.2%} of the picture on average, {top:.2f} of 1 at most; the reference will "
            "hardly show"
        )
    return Mask(values, name, tuple(notes))


def _of_array(array: np.ndarray, name: str) -> Float32[np.ndarray, "h w"]:
    if array.ndim != 2 or not array.size:
        raise UserError(
            f"{name}: a mask of shape {list(array.shape)}; expected [h, w], one value a pixel; choose one channel"
        )
    if array.dtype.kind == "b" or (array.dtype.kind in "iu" and 0 <= array.min() and array.max() <= 1):
        return array.astype(np.float32)
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    return unit(array, name, f"a mask of {ARRAY}").astype(np.float32)


def _grey(source: Any, name: str) -> np.ndarray:
    """uint8 `[h, w]` of a picture."""
    picture = decoded(source, name, MAX_PIXELS)
    laid = laid_on(BLACK, picture)
    rgb = np.asarray(laid)
    if np.any(rgb.max(axis=-1) - rgb.min(axis=-1) > COLOURED):
        red, green, blue = rgb.reshape(-1, 3).max(axis=0)
        raise UserError(
            f"{name}: a mask in colour (at most {red}, {green}, {blue} of red, green, blue); expected white inside and black "
            "outside; paint it white"
        )
    grey = np.asarray(laid.convert("L"))
    if picture.mode == "RGBA" and grey.max() == 0:
        opacity = np.asarray(picture.getchannel("A"))
        grey = opacity if opacity.min() < opacity.max() else grey
    return grey
