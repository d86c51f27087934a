"""Safetensors files, read one tensor at a time, with errors a user can act on; and trees of arrays in them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from safetensors import SafetensorError, safe_open

from dynaip_jax.errors import UserError
from dynaip_jax.storage.folders import AnyPath, as_path, local_copy
from dynaip_jax.storage.manifest import flatten


class TensorFile(Mapping[str, np.ndarray]):
    """A safetensors file, or a sharded set named by its `*.index.json`, as a mapping name -> array.

    Every access reads that one tensor from disk. `shape(name)` and `metadata` read headers only. A file in a bucket is
    copied to a temporary folder, which lives as long as the object.
    Raises `UserError` for a missing, truncated or corrupt file and for shards that disagree with their index.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = as_path(path)
        self.files: list[AnyPath] = _shards(path) if path.name.endswith(".index.json") else [path]
        self.metadata: dict[str, str] = {}
        self._where = {}
        self._copies = contextlib.ExitStack()
        for file in self.files:
            if not file.is_file():
                raise UserError(
                    f"{file}: no such file; expected a safetensors file; check the path or download it again"
                )
            try:
                handle = safe_open(self._copies.enter_context(local_copy(file)), framework="np")
                self.metadata.update(handle.metadata() or {})
                self._where.update({name: handle for name in handle.keys()})
            except (SafetensorError, OSError) as e:
                raise UserError(f"{file}: not a whole safetensors file ({e}); download or copy it again") from e

    def __getitem__(self, name: str) -> np.ndarray:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor; no more of it is read."""
        return self._where[name].get_slice(name)[index] if index else self[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._where[name].get_slice(name).get_shape())


def _shards(index: AnyPath) -> list[AnyPath]:
    try:
        names = json.loads(index.read_text())["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{index}: not a safetensors index ({e}); expected JSON with 'weight_map'; download it again"
        ) from e
    return [index.parent / name for name in sorted(set(names))]


def read_tree(path: str | os.PathLike[str]) -> Any:
    """The parameter tree in a safetensors file whose names are paths in it, as `flatten` makes them."""
    from flax.traverse_util import unflatten_dict

    file = TensorFile(path)
    return unflatten_dict({name: np.asarray(file[name]) for name in file}, sep=".")


def write_tree(path: Path, params: Mapping[str, Any]) -> None:
    """Writes a tree of arrays to a local file, as `read_tree` reads it."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(x) for name, x in flatten(params).items()}, path)
