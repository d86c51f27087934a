"""Reads caches of features (`features.py`), a row at a time, holding nothing of all rows."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Int32

from dynaip_jax.data import features
from dynaip_jax.data.config import Bucket, DataConfig
from dynaip_jax.data.features import FILE, Store, moments_name, slots, told
from dynaip_jax.data.order import BatchOrder
from dynaip_jax.data.records import Dataset
from dynaip_jax.data.samples import draw
from dynaip_jax.errors import UserError, reason
from dynaip_jax.reading import is_file
from dynaip_jax.storage.arrays import Rows
from dynaip_jax.storage.folders import is_bucket

OPEN_AT_ONCE = 16  # parts of a cache in one process, of up to a dozen files each


class CachedBatch(NamedTuple):
    """One process's part of a global batch, as the encoders left it."""

    moments: Float[np.ndarray, "b h w 2z"]  # of the VAE
    states: Float[np.ndarray, "b t c"]  # of the text; of the empty prompt where the text is dropped
    pooled: Float[np.ndarray, "b c"] | None  # likewise; None for a family without it
    levels: tuple[Float[np.ndarray, "b 1 m c"], ...] | None  # three, of CLIP vision; None in a cache for a base
    keep_image: Float32[np.ndarray, " b"]  # 0 where the image prompt is dropped, otherwise 1
    row: Int32[np.ndarray, " b"]  # index into the dataset


class Part:
    """The rows of a folder of arrays, which are opened as they are asked for.

    `listed`: its arrays, which have checksums; None in caches of before there were any. `bucket_of`: for each row the index of its
    bucket.
    """

    def __init__(self, store: Store, variants: int, listed: list[str] | None, bucket_of: Int[np.ndarray, " n"]):
        self._store, self._variants, self._listed, self._bucket_of = store, variants, listed, bucket_of
        self._open: dict[str, Rows] = {}

    @cached_property
    def _slot(self) -> np.ndarray:
        """Position of each row among those of its bucket."""
        return slots(self._bucket_of)

    @cached_property
    def _members(self) -> np.ndarray:
        """How many rows each bucket has."""
        return np.bincount(self._bucket_of)

    def has(self, name: str) -> bool:
        """Whether the part has an array of this name."""
        if self._listed is None:
            return is_file(self._store.folder / f"{name}.npy")
        return name in self._listed

    def text(self, name: str, row: int) -> np.ndarray:
        """What the prompt of a row gives, by the name of the array."""
        return self._read(name, (len(self._bucket_of),), row)

    def empty(self, name: str) -> np.ndarray:
        """The same of the empty prompt."""
        return self._read(f"empty_{name}", ())

    def levels(self, row: int, variant: int) -> np.ndarray:
        """CLIP's levels `[3, m, c]` of a row."""
        return self._read("levels", (self._variants, len(self._bucket_of)), variant, row)

    def moments(self, row: int, variant: int, bucket: Bucket) -> np.ndarray:
        """The VAE's moments `[h, w, 2z]` of a row, which is in `bucket`."""
        with told(self._store.folder / features.PART):
            leading, slot = (self._variants, int(self._members[self._bucket_of[row]])), int(self._slot[row])
        return self._read(moments_name(bucket), leading, variant, slot)

    def _read(self, name: str, leading: tuple[int, ...], *index: int) -> np.ndarray:
        """A row, in the cache's dtype."""
        if name not in self._open:
            self._open[name] = self._store.rows(name, leading, checked=self._listed is not None)
        array = self._open[name]
        with told(array.path):
            return array[index].view(self._store.dtype)


class Parts:
    """The parts of a cache, of which few are open at a time; threads may share it. May be sent to other processes."""

    def __init__(self, path: Path, dtype: str, variants: int, key: str):
        self._facts = path, dtype, variants, key
        self._open: OrderedDict[int, Part] = OrderedDict()  # the one used last is the last
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._facts

    def __getitem__(self, number: int) -> Part:
        path, dtype, variants, key = self._facts
        with self._lock:
            part = self._open.pop(number, None)
            if part is None:
                folder = path / features.part_name(number)
                with told(folder / features.PART):
                    part = Part(Store(folder, dtype), variants, *features.read_part(folder, key, number))
            self._open[number] = part
            if len(self._open) > OPEN_AT_ONCE:
                self._open.popitem(last=False)
        return part


@dataclasses.dataclass(frozen=True)
class Cached:
    """Reads a cache folder; see `samples.Reader`. Sample for sample what `samples.Pictures` and the encoders would make,
    but that the augmentation of epoch e is that of epoch e modulo `variants`."""

    dataset: Dataset
    config: DataConfig
    variants: int
    rows_a_part: int
    parts: (
        Parts | list[Part]
    )  # a list of the only one in caches of before there were parts, which holds the bucket of each row

    @classmethod
    def open(cls, config: DataConfig, dataset: Dataset, order: BatchOrder, encoders: str) -> Cached:
        """Checks the folder `config.features` against what training asks for. Raises `UserError` if it does not fit."""
        if is_bucket(config.features):
            raise UserError(
                f"`data.features` {config.features}: features are read in parts of files, which a bucket does not allow; expected a "
                "local folder; copy them to a disk"
            )
        path = Path(config.features)
        try:
            stored = features.read_facts(path)
        except (OSError, ValueError) as e:
            raise UserError(
                f"`data.features` {path}: no readable {FILE} ({reason(e)}); expected a folder made by python -m train.cache"
            ) from e
        dtype, variants, made_of = stored["facts"]["dtype"], stored["variants"], stored["facts"]
        _check(path, made_of, features.facts(config, order, encoders, dtype, dataset.content))
        if stored["format_version"] == features.WHOLE:
            whole = Part(Store(path, dtype), variants, stored.get("arrays"), order.bucket_of)
            return cls(dataset, config, variants, len(dataset), [whole])
        rows_a_part = stored["rows_a_part"]
        key = features.cache_key(made_of, variants, rows_a_part)
        return cls(dataset, config, variants, rows_a_part, Parts(path, dtype, variants, key))

    def read(self, rows: Int[np.ndarray, " b"], bucket: Bucket, epoch: int) -> CachedBatch:
        """The `CachedBatch` of dataset indices `rows` `[b]`."""
        chances = [draw(self.config, epoch, int(row)) for row in rows]
        variant = epoch % self.variants
        places = [(self.parts[number], place) for number, place in (divmod(int(row), self.rows_a_part) for row in rows)]

        def text(name: str) -> np.ndarray:
            pairs = zip(chances, places, strict=True)
            return np.stack([part.empty(name) if c.drop_text else part.text(name, place) for c, (part, place) in pairs])

        first, levels = places[0][0], None
        if first.has("levels"):
            stacked = np.stack([part.levels(place, variant) for part, place in places])
            levels = tuple(np.array(stacked[:, n, None]) for n in range(stacked.shape[1]))
        return CachedBatch(
            moments=np.stack([part.moments(place, variant, bucket) for part, place in places]),
            states=text("states"),
            pooled=text("pooled") if first.has("pooled") or first.has("empty_pooled") else None,
            levels=levels,
            keep_image=np.array([not c.drop_image for c in chances], np.float32),
            row=np.asarray(rows, np.int32),
        )


def _check(path: Path, made_of: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises `UserError` if a cache was `made_of` something else than is `wanted`; warns where nobody can tell."""
    if "content" in wanted and "content" not in made_of:
        warnings.warn(
            f"features {path}: made before caches knew the content of their dataset; nobody can tell whether its pictures are still "
            "those of the cache; make it again to be sure",
            stacklevel=3,
        )
        del wanted["content"]
    flat = [{**{k: v for k, v in f.items() if k != "data"}, **f["data"]} for f in (made_of, wanted)]
    for name, value in flat[1].items():
        if (stated := flat[0].get(name)) != value:
            stated, value = (str(x)[:12] if name == "content" else repr(x) for x in (stated, value))
            raise UserError(
                f"`data.features` {path}: made with {name} {stated}; this run has {value}; make the cache again with this run's options"
            )
