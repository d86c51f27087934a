"""The way back: a component of a bundle as a safetensors file under public names, by the table that it was converted with."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dynaip_jax.errors import UserError, reason
from dynaip_jax.storage.bundle import Bundle
from tools.convert_torch_weights.engine import Leaf, Part, Table

NAMES = {
    np.dtype(np.float64): "F64", np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"
}  # fmt: skip


class Place(NamedTuple):
    """Where a part of a public tensor lies: the leaf, its block if blocks are stacked, the leaf's entry in the table, and which part."""

    leaf: str
    block: int | None
    entry: Leaf
    number: int


def write(bundle: Bundle, component: str, table: Table, path: Path) -> None:
    """Writes the file `path`, one tensor in memory at a time. Raises `UserError` for a bundle that cannot be read."""
    stored = Stored(bundle.part(component))
    places: dict[str, list[Place]] = {}
    for leaf, entry in table.items():
        for block, one in enumerate(entry) if isinstance(entry, list) else ((None, entry),):
            for number, part in enumerate(one.parts):
                places.setdefault(part.name, []).append(Place(leaf, block, one, number))
    header, end = {}, 0
    kinds = {}
    for name in sorted(places):
        kinds[name] = max((stored.dtype(p.leaf) for p in places[name]), key=lambda d: d.itemsize)
        shape = _part(places[name][0]).shape
        size = math.prod(shape) * kinds[name].itemsize
        header[name] = dict(dtype=NAMES[kinds[name]], shape=list(shape), data_offsets=[end, end + size])
        end += size
    text = json.dumps(dict(__metadata__=dict(format="pt")) | header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in header:
            file.write(_built(stored, places[name], kinds[name]).reshape(-1).view(np.uint8).data)


def _part(place: Place) -> Part:
    return place.entry.parts[place.number]


def _built(stored: Stored, places: list[Place], dtype: np.dtype) -> np.ndarray:
    """A public tensor of its parts."""
    whole = np.empty(_part(places[0]).shape, dtype)
    for place in places:
        parts, axes = place.entry.parts, place.entry.axes
        shapes = [_shape(part) for part in parts]
        joined = (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()
        turned = tuple(joined[a] for a in axes) if axes else joined
        x = stored.read(place.leaf, place.block).reshape(turned)
        x = x.transpose(np.argsort(axes)) if axes else x
        part = parts[place.number]
        if not part.shape:
            whole[...] = x
            continue
        first = sum(s[0] for s in shapes[: place.number])
        start, stop = part.rows
        whole[(slice(None),) * part.axis + (slice(start, stop),)] = x[first : first + shapes[place.number][0]]
    return whole


def _shape(part: Part) -> tuple[int, ...]:
    """Of the rows that a part is."""
    start, stop = part.rows if part.shape else (0, 0)
    return tuple(stop - start if axis == part.axis else n for axis, n in enumerate(part.shape))


class Stored:
    """The leaves of a component on disk ("a/b" names), opened and not read, whichever way Orbax has laid them."""

    def __init__(self, folder: Any):
        self._folder = Path(folder).absolute()
        self._packed = (self._folder / "manifest.ocdbt").exists()
        self._open: dict[str, Any] = {}

    def dtype(self, leaf: str) -> np.dtype:
        return np.dtype(self._array(leaf).dtype.numpy_dtype)

    def read(self, leaf: str, block: int | None) -> np.ndarray:
        """All of a leaf, or one of its blocks."""
        array = self._array(leaf)
        try:
            return np.asarray((array if block is None else array[block]).read().result())
        except Exception as e:  # tensorstore raises its own
            raise self._unread(leaf, e) from e

    def _array(self, leaf: str) -> Any:
        import tensorstore

        if leaf not in self._open:
            name = leaf.replace("/", ".")
            store: Mapping[str, Any] = (
                dict(driver="ocdbt", base=f"file://{self._folder}/", path=f"{name}/")
                if self._packed
                else dict(driver="file", path=f"{self._folder / name}/")
            )
            try:
                self._open[leaf] = tensorstore.open(dict(driver="zarr", kvstore=store), open=True, read=True).result()
            except Exception as e:
                raise self._unread(leaf, e) from e
        return self._open[leaf]

    def _unread(self, leaf: str, e: Exception) -> UserError:
        return UserError(
            f"{self._folder}: {leaf} cannot be read ({reason(e)}); expected whole weights; convert the model again"
        )
