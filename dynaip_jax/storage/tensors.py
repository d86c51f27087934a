"""Safetensors files, read one tensor at a time, with errors a user can act on; and trees of arrays in them.

The format is read here, not by the library: headers strictly, values by reading the file, so that one that is cut short meanwhile
is an error and not the end of the process, as it would be of a memory map.
"""

from __future__ import annotations

import abc
import contextlib
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from dynaip_jax import reading
from dynaip_jax.errors import UserError, reason
from dynaip_jax.schema import typed
from dynaip_jax.storage import arena
from dynaip_jax.storage.folders import AnyPath, as_path, local_copy
from dynaip_jax.storage.manifest import flatten

DTYPES: dict[str, Any] = {  # that a file may hold, by their names in it
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32, "I32": np.int32,
    "U64": np.uint64, "I64": np.int64, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip
WEIGHTS = ("float16", "bfloat16", "float32", "float64")  # dtypes that weights may have
HEADER_BYTES = 100_000_000  # the library's own limit
DAMAGED = "download or copy it again"


class Tensor(NamedTuple):
    """Where a tensor lies: its file's index, dtype, shape, and its first byte."""

    file: int
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class Tensors(Mapping[str, np.ndarray]):
    """Named tensors of a source, each read when it is asked for. `_tensors` has an entry for each."""

    _tensors: Mapping[str, Any]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.part(name, ())

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @abc.abstractmethod
    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor."""

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""

    @abc.abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor."""


class TensorFile(Tensors):
    """A safetensors file, or a sharded set named by its `*.index.json`, or by its `files` alone, as a mapping name -> array.

    Every access reads that one tensor from disk. `shape(name)`, `dtype(name)` and `metadata` read headers only. A file in a bucket
    is copied to a temporary folder, which lives as long as the object.
    Raises `UserError` for a missing, truncated or corrupt file and for shards that disagree with their index.
    """

    def __init__(self, path: str | os.PathLike[str], files: Sequence[AnyPath] = ()):
        path = as_path(path)
        index = _index(path) if path.name.endswith(".json") and ".index." in path.name else None
        self.files: list[AnyPath] = list(files) or [path]
        if index is not None:
            self.files = [path.parent / f for f in sorted(set(index.values()))]
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        self._copies, self._open = contextlib.ExitStack(), []
        for number, file in enumerate(self.files):
            if not reading.is_file(file):
                raise UserError(
                    f"{file}: no such file; expected a safetensors file; check the path or download it again"
                )
            try:
                self._open.append(open(self._copies.enter_context(local_copy(file)), "rb"))
                metadata, tensors = _header(self._open[-1], number)
            except (OSError, ValueError) as e:
                raise UserError(f"{file}: not a whole safetensors file ({reason(e)}); {DAMAGED}") from e
            if index is not None:
                _check_shard(path, file, tensors, index)
            if twice := sorted(self._tensors.keys() & tensors):
                raise UserError(
                    f"{file}: {twice[0]} is in {self.files[0].name} or another shard too; expected it once; {DAMAGED}"
                )
            self.metadata |= metadata
            self._tensors |= tensors

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor; of its first axis no more is read."""
        t = self._tensors[name]
        if not t.shape:
            return self._read(t, 0, 1).reshape(())
        start, stop, _ = (index or (slice(None),))[0].indices(t.shape[0])
        row, rest = math.prod(t.shape[1:]), tuple(index[1:])
        if not any(s != slice(None) for s in rest):
            return self._read(t, start * row, max(0, stop - start) * row).reshape(
                -1 if row else stop - start, *t.shape[1:]
            )
        rows = [self._read(t, n * row, row).reshape(t.shape[1:])[rest] for n in range(start, stop)]
        return np.stack(rows)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor, without reading it."""
        return self._tensors[name].dtype

    def _read(self, t: Tensor, first: int, count: int) -> np.ndarray:
        """`count` values of a tensor, from the value `first` on."""
        values, at = arena.empty((count,), t.dtype), t.start + first * t.dtype.itemsize
        left = memoryview(values.view(np.uint8).data)
        while len(left):
            done = os.preadv(self._open[t.file].fileno(), [left[: 1 << 30]], at)
            if not done:
                raise UserError(
                    f"{self.files[t.file]}: was cut short while it was read; expected a whole file; {DAMAGED}"
                )
            left, at = left[done:], at + done
        return values


def check_weights(where: str, name: str, dtype: Any) -> None:
    """Raises `UserError`, naming the tensor `name` of `where`, unless `dtype` is one of those that weights may have."""
    if str(dtype) not in WEIGHTS:
        raise UserError(
            f"{where}: {name} holds {dtype}; expected weights in {', '.join(WEIGHTS)}; use a file in one of these precisions"
        )


def _header(file: BinaryIO, number: int) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file. Raises `ValueError` unless its header is exactly what the format asks for."""
    size, start = os.fstat(file.fileno()).st_size, file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(HEADER_BYTES, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError("its header does not begin with {")
    header = reading.parse_json(text.rstrip(b" "), HEADER_BYTES)
    metadata = typed(dict[str, str], header.pop("__metadata__", {}), "__metadata__")
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(*item)):
        first, stop = _offsets(name, entry)
        kind, shape = entry["dtype"], typed(tuple[int, ...], entry["shape"], f"shape of {name}")
        if not isinstance(kind, str) or kind not in DTYPES:
            raise ValueError(f"{name} has the dtype {kind!r}, expected one of {', '.join(DTYPES)}")
        dtype = np.dtype(DTYPES[kind])
        if min(shape, default=0) < 0 or stop - first != math.prod(shape) * dtype.itemsize or first != end:
            raise ValueError(
                f"{name}: bytes {first} to {stop} do not fit its shape {list(shape)} and {kind}, or its neighbours"
            )
        tensors[name], end = Tensor(number, dtype, shape, 8 + length + first), stop
    if size != 8 + length + end:
        raise ValueError(f"{size} bytes, expected {8 + length + end}")
    return metadata, tensors


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected dtype, shape and data_offsets")
    first, stop = typed(tuple[int, int], entry["data_offsets"], f"data_offsets of {name}")
    return first, stop


def _index(index: AnyPath) -> dict[str, str]:
    """Tensor name -> file name, both as the index says."""
    advice = "download it again"
    try:
        content = reading.parse_json(reading.read_bytes(index, reading.JSON_BYTES))
        if not isinstance(content, dict) or "weight_map" not in content:
            raise ValueError("no weight_map")
        names = typed(dict[str, str], content["weight_map"], "weight_map")
        if not names:
            raise ValueError("weight_map is empty")
        for file in set(names.values()):
            if Path(file).name != file or not file.endswith(".safetensors") or not file.isprintable():
                raise ValueError(f"weight_map names {file!r}, no .safetensors file beside it")
    except (OSError, ValueError) as e:
        raise UserError(f"{index}: not a safetensors index ({reason(e)}); {advice}") from e
    return names


def _check_shard(path: AnyPath, file: AnyPath, tensors: Mapping[str, Tensor], index: Mapping[str, str]) -> None:
    """Raises `UserError` unless the shard `file` holds just what the index says."""
    listed = {name for name, where in index.items() if where == file.name}
    if wrong := sorted(listed ^ tensors.keys()):
        what = "is not in it" if wrong[0] in listed else "is in it, which the index does not say"
        raise UserError(f"{file}: {wrong[0]} {what}; expected what {path.name} says; {DAMAGED}")


def read_tree(path: str | os.PathLike[str]) -> Any:
    """The parameter tree in a safetensors file whose names are paths in it, as `flatten` makes them."""
    from flax.traverse_util import unflatten_dict

    file = TensorFile(path)
    for name in file:
        check_weights(os.fspath(path), name, file.dtype(name))
    branches = {name[:n] for name in file for n, c in enumerate(name) if c == "."}
    if both := sorted(branches & set(file)):
        raise UserError(f"{path}: {both[0]} is a tensor and a group of tensors; expected a tree of names; {DAMAGED}")
    return unflatten_dict({name: file[name] for name in file}, sep=".")


def write_tree(path: Path, params: Mapping[str, Any]) -> None:
    """Writes a tree of arrays to a local file, as `read_tree` reads it. Raises `OSError` if the disk is full."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file({name: np.ascontiguousarray(x) for name, x in flatten(params).items()}, path)
    except SafetensorError as e:
        raise OSError(reason(e)) from e
