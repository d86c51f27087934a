"""Arrays of other libraries as NumPy's, and arrays as pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dynaip_jax.errors import UserError


def is_array(value: Any) -> bool:
    """Whether `value` is an array of NumPy, JAX, torch or another library that NumPy understands."""
    return hasattr(value, "__array__") and not isinstance(value, (Image.Image, str, bytes))


def as_array(value: Any, name: str) -> np.ndarray:
    """A NumPy array of the same values; floats of few bits become float32. Raises `UserError`, naming it `name`, if there is no such."""
    try:
        if hasattr(value, "detach"):  # of torch, on any device, with a gradient
            value = value.detach().cpu()
        array = np.asarray(value)
    except Exception as e:  # each library raises its own
        raise UserError(
            f"{name}: {type(value).__name__} cannot be read as a NumPy array ({e}); expected one in memory; convert it to float32"
        ) from e
    return array.astype(np.float32) if array.dtype.name.startswith(("bfloat", "float8", "float16")) else array


def pixels(array: np.ndarray, name: str) -> UInt8[np.ndarray, "H W 3"]:
    """uint8 `[H, W, 3]` from such an array or from floats in [0, 1]. Raises `UserError` for another shape, type or range.

    An array does not say what its channels mean: grey, RGBA and the like are refused, where a PIL image would do.
    """
    shape = list(array.shape)
    if array.ndim == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4):
        raise UserError(
            f"{name}: an array of shape {shape}, channels first; expected [H, W, 3]; pass x.transpose(1, 2, 0)"
        )
    if array.ndim != 3 or shape[2] != 3:
        raise UserError(
            f"{name}: an array of shape {shape}; expected [H, W, 3], RGB; pass PIL.Image.fromarray(x), which says what its "
            "channels are"
        )
    if array.dtype == np.uint8:
        return np.array(array)
    return np.round(unit(array, name, "uint8, or floats from 0 to 1") * 255).astype(np.uint8)


def unit(array: np.ndarray, name: str, expected: str) -> np.ndarray:
    """`array`, if it holds floats from 0 to 1. Raises `UserError` if not."""
    if array.dtype.kind != "f":
        raise UserError(f"{name}: an array of {array.dtype.name}; expected {expected}; convert it")
    if array.size and not np.isfinite(array).all():
        raise UserError(f"{name}: the array holds NaN or infinity; expected {expected}; check where it comes from")
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        raise UserError(
            f"{name}: the array holds floats from {array.min():.4g} to {array.max():.4g}; expected {expected}; scale it"
        )
    return array
