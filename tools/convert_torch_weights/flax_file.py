"""Flax's msgpack files, read strictly: nothing in them is lost, nothing but arrays is taken.

Format (flax `serialization`): nested maps with text as keys; an array is the extension 1, itself msgpack of (shape, dtype's name,
bytes); one of more than 2**30 bytes is a map of its chunks, which transformers' CLIP files do not reach.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from dynaip_jax import reading
from dynaip_jax.errors import UserError, reason
from dynaip_jax.schema import typed
from dynaip_jax.storage.tensors import DTYPES

ARRAY = 1  # the extension's number
MOST_BYTES = 1 << 33
DEPTH = 64
NAMES = {np.dtype(kind).name: np.dtype(kind) for kind in DTYPES.values()}


def leaves(path: Path) -> dict[tuple[str, ...], np.ndarray]:
    """Path in the tree -> array. Raises `UserError` for a file that is missing, truncated or corrupt, or no tree of arrays."""
    try:
        tree = msgpack.unpackb(
            reading.read_bytes(path, MOST_BYTES),
            ext_hook=_array,
            object_pairs_hook=_map,
            strict_map_key=False,
            raw=False,
        )
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({reason(e)}); expected a flax_model.msgpack; check the path") from e
    except Exception as e:  # whatever the parser makes of bytes that are not msgpack
        raise UserError(f"{path}: not a whole Flax msgpack file ({reason(e)}); download or copy it again") from e
    arrays: dict[tuple[str, ...], np.ndarray] = {}
    if not isinstance(tree, dict) or not _collect(tree, (), arrays):
        raise UserError(f"{path}: holds no tree of arrays; expected a flax_model.msgpack; download or copy it again")
    return arrays


def _collect(tree: dict[str, Any], where: tuple[str, ...], arrays: dict[tuple[str, ...], np.ndarray]) -> bool:
    """Adds the arrays of `tree`; whether it holds arrays and groups of them alone."""
    for name, value in tree.items():
        if isinstance(value, np.ndarray):
            arrays[*where, name] = value
        elif not isinstance(value, dict) or len(where) > DEPTH or not _collect(value, (*where, name), arrays):
            return False
    return bool(tree)


def _map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs) or not all(isinstance(name, str) for name in values):
        raise ValueError("a map has a name twice, or one that is no text")
    return values


def _array(code: int, data: bytes) -> np.ndarray:
    if code != ARRAY:
        raise ValueError(f"extension {code}, expected arrays")
    shape, name, values = msgpack.unpackb(data, raw=True, use_list=True)
    shape = typed(tuple[int, ...], shape, "shape")
    dtype = NAMES.get(name.decode())
    if dtype is None or min(shape, default=0) < 0 or len(values) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of {len(values)} bytes, shape {shape} and dtype {name!r}")
    return np.frombuffer(values, dtype).reshape(shape)
