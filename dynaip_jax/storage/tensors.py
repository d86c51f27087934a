"""Reading safetensors files one tensor at a time, with errors a user can act on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from safetensors import SafetensorError, safe_open

from dynaip_jax.errors import UserError


class TensorFile(Mapping[str, np.ndarray]):
    """A safetensors file, or a sharded set named by its `*.index.json`, as a mapping name -> array.

    Every access reads that one tensor from disk. `shape(name)` and `metadata` read headers only.
    Raises `UserError` for a missing, truncated or corrupt file and for shards that disagree with their index.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        self.files = _shards(path) if path.name.endswith(".index.json") else [path]
        self.metadata: dict[str, str] = {}
        self._where = {}
        for file in self.files:
            if not file.is_file():
                raise UserError(
                    f"{file}: no such file; expected a safetensors file; check the path or download it again"
                )
            try:
                handle = safe_open(file, framework="np")
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


def _shards(index: Path) -> list[Path]:
    try:
        names = json.loads(index.read_text())["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{index}: not a safetensors index ({e}); expected JSON with 'weight_map'; download it again"
        ) from e
    return [index.parent / name for name in sorted(set(names))]
