"""Precomputed features: what the frozen encoders make of a dataset, so that training holds the MM-DiT and the adapter alone.

A folder holds `features.json` (what they were made of) and NumPy files, read row by row and compared with checksums: the states of each row's text,
its pooled text if the family has any, and, `variants` times with different augmentation, its VAE moments and CLIP levels. bfloat16
is stored as its bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int, Int32

from dynaip_jax.choices import DTYPES
from dynaip_jax.data.config import Bucket, DataConfig
from dynaip_jax.data.order import BatchOrder
from dynaip_jax.data.records import Dataset
from dynaip_jax.data.samples import draw
from dynaip_jax.errors import UserError, reason, shortened
from dynaip_jax.reading import JSON_BYTES, is_file, parse_json, read_bytes
from dynaip_jax.schema import typed
from dynaip_jax.storage.arrays import Rows, crc32, read_array
from dynaip_jax.storage.folders import is_bucket, reserve

FILE, FORMAT, VERSION = "features.json", "dynaip-features", 1
CHECKS = ".checks.npy"  # after the name of an array: the checksums of its rows
SHAPING = (  # fields of DataConfig that change what is stored
    "resolution", "aspects", "clip_size", "square", "remove_background", "crop_reference", "flip_reference", "flip_target", "seed",
)  # fmt: skip


class CachedBatch(NamedTuple):
    """One process's part of a global batch, as the encoders left it."""

    moments: Float[np.ndarray, "b h w 2z"]  # of the VAE
    states: Float[np.ndarray, "b t c"]  # of the text; of the empty prompt where the text is dropped
    pooled: Float[np.ndarray, "b c"] | None  # likewise; None for a family without it
    levels: tuple[Float[np.ndarray, "b 1 m c"], ...] | None  # three, of CLIP vision; None in a cache for a base
    keep_image: Float32[np.ndarray, " b"]  # 0 where the image prompt is dropped, otherwise 1
    row: Int32[np.ndarray, " b"]  # index into the dataset


def facts(config: DataConfig, order: BatchOrder, encoders: str, dtype: str, content: str) -> dict[str, Any]:
    """What a cache depends on: rows and buckets, augmentation, encoders (an identity of theirs), precision, and the `content` of the
    dataset, unless it is empty."""
    shaping = {name: getattr(config, name) for name in SHAPING}
    made_of = dict(plan=order.fingerprint, data=shaping, encoders=encoders, dtype=dtype)
    return json.loads(json.dumps(made_of | (dict(content=content) if content else {})))


class Store:
    """The arrays of a cache folder by name, with a checksum of each row: filled by `put`, ended by `finish`, then read as `rows`."""

    def __init__(self, folder: Path, dtype: str):
        self.folder, self.dtype = folder, np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        self._arrays: dict[str, np.ndarray] = {}
        self._checks: dict[str, np.ndarray] = {}

    @property
    def _bits(self) -> np.dtype:
        return np.dtype(np.uint16) if self.dtype.itemsize == 2 else self.dtype

    def create(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A new array on disk."""
        path = self.folder / f"{name}.npy"
        array = np.lib.format.open_memmap(path, "w+", self._bits, shape)
        reserve(path)
        return array.view(self.dtype)

    def put(self, name: str, shape: tuple[int, ...], where: tuple[Any, ...], values: Any) -> None:
        """Writes a part of the array `name`, which is made with `shape` at the first time: at `where`, whose last index, if there is
        one, counts the rows of `values`."""
        if name not in self._arrays:
            self._arrays[name] = self.create(name, shape)
            self._checks[name] = np.zeros(shape[: len(where)], np.uint32)
        values = np.asarray(values, self.dtype)
        self._arrays[name][where] = values
        self._checks[name][where] = [crc32(row) for row in values] if where else crc32(values)

    def finish(self) -> None:
        """Writes the checksums."""
        for name, checks in self._checks.items():
            np.save(self.folder / f"{name}{CHECKS}", checks)

    def rows(self, name: str, leading: tuple[int, ...] = (), *, checked: bool) -> Rows:
        """An array of the folder, to be read row by row and, if it is `checked`, compared with its checksums.

        Raises `UserError` if it is missing or damaged, or its first axes are not `leading`.
        """
        path = self.folder / f"{name}.npy"
        with told(path):
            checks = read_array(read_bytes(self.folder / f"{name}{CHECKS}", 1 << 32)) if checked else None
            array = Rows(path, checks)
            if array.head.dtype != self._bits or array.shape[: len(leading)] != leading:
                raise ValueError(f"{array.head.dtype} {array.shape}, expected {self._bits} {leading} and more")
            if checks is not None and checks.shape != array.shape[: checks.ndim]:
                raise ValueError(f"its checksums are {checks.shape}")
        return array


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """What goes wrong with the file `path` of a cache is a `UserError`."""
    try:
        yield
    except (OSError, ValueError, IndexError) as e:
        raise UserError(
            f"{path}: cannot be read ({reason(e)}); expected what python -m train.cache wrote; run it again"
        ) from e


def write_facts(folder: Path, made_of: Mapping[str, Any], variants: int) -> None:
    """Writes `features.json`, which ends a cache: what it was made of, in how many `variants`, and its arrays."""
    arrays = sorted(file.name.removesuffix(CHECKS) for file in folder.glob(f"*{CHECKS}"))
    content = dict(format=FORMAT, format_version=VERSION, variants=variants, facts=made_of, arrays=arrays)
    (folder / FILE).write_text(json.dumps(content | dict(checksum=_digest(content)), indent=2) + "\n")


def _read_facts(path: Path) -> dict[str, Any]:
    """The content of `features.json`. Raises `ValueError` or `OSError` for anything else than `write_facts` writes; caches of before
    checksums are read."""
    stored = parse_json(read_bytes(path / FILE, JSON_BYTES))
    kinds = dict(
        format=str, format_version=int, variants=int, facts=dict[str, Any], arrays=tuple[str, ...], checksum=str
    )
    typed(dict[str, Any], stored, FILE)
    if stored.get("format") != FORMAT or stored.get("format_version") != VERSION:
        version = shortened(f"{stored.get('format')} {stored.get('format_version')}", 60)
        raise ValueError(f"format {version}, expected {FORMAT} {VERSION}")
    if (wrong := stored.keys() ^ kinds.keys()) - {"arrays", "checksum"}:
        raise ValueError(f"{min(wrong)!r} is missing or unknown")
    for name, value in stored.items():
        typed(kinds[name], value, name)
    typed(dict[str, Any], stored["facts"].get("data"), "data")
    if stored["variants"] < 1 or stored["facts"].get("dtype") not in DTYPES:
        raise ValueError(f"{stored['variants']} variants of {shortened(repr(stored['facts'].get('dtype')), 40)}")
    if "arrays" in stored and stored.get("checksum") != _digest({k: v for k, v in stored.items() if k != "checksum"}):
        raise ValueError("its checksum is another: it was damaged or changed")
    return stored


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def moments_name(bucket: Bucket) -> str:
    """Name of the array that holds the VAE moments of a bucket's rows."""
    return f"moments_{bucket.height}x{bucket.width}"


@dataclasses.dataclass(frozen=True)
class Cached:
    """Reads a cache folder; see `samples.Reader`. Sample for sample what `samples.Pictures` and the encoders would make,
    but that the augmentation of epoch e is that of epoch e modulo `variants`."""

    dataset: Dataset
    config: DataConfig
    bucket_of: Int[np.ndarray, " n"] = dataclasses.field(repr=False)  # of the batch order
    path: Path
    dtype: str
    variants: int
    listed: list[str] | None  # its arrays, which have checksums; None in caches of before there were any

    @classmethod
    def open(cls, config: DataConfig, dataset: Dataset, order: BatchOrder, encoders: str) -> Cached:
        """Checks the folder `config.features` against what training asks for. Raises `UserError` if it does not fit."""
        if is_bucket(config.features):
            raise UserError(
                f"`data.features` {config.features}: features are mapped into memory, which a bucket does not allow; expected a "
                "local folder; copy them to a disk"
            )
        path = Path(config.features)
        try:
            stored = _read_facts(path)
        except (OSError, ValueError) as e:
            raise UserError(
                f"`data.features` {path}: no readable {FILE} ({reason(e)}); expected a folder made by python -m train.cache"
            ) from e
        dtype, variants, made_of = stored["facts"]["dtype"], stored["variants"], stored["facts"]
        wanted = facts(config, order, encoders, dtype, dataset.content)
        if "content" in wanted and "content" not in made_of:
            warnings.warn(
                f"features {path}: made before caches knew the content of their dataset; nobody can tell whether its pictures are still "
                "those of the cache; make it again to be sure",
                stacklevel=2,
            )
            del wanted["content"]
        flat = [{**{k: v for k, v in f.items() if k != "data"}, **f["data"]} for f in (made_of, wanted)]
        for name, value in flat[1].items():
            if (stated := flat[0].get(name)) != value:
                stated, value = (str(x)[:12] if name == "content" else repr(x) for x in (stated, value))
                raise UserError(
                    f"`data.features` {path}: made with {name} {stated}; this run has {value}; make the cache again with this run's options"
                )
        return cls(dataset, config, order.bucket_of, path, dtype, variants, stored.get("arrays"))

    @cached_property
    def _slot(self) -> np.ndarray:
        """Position of each row among those of its bucket."""
        return slots(self.bucket_of)

    @cached_property
    def _members(self) -> np.ndarray:
        """How many rows each bucket has."""
        return np.bincount(self.bucket_of)

    @cached_property
    def _moments(self) -> dict[str, Rows]:
        """Those that have been opened."""
        return {}

    @cached_property
    def _arrays(self) -> dict[str, Rows]:
        count = len(self.bucket_of)
        leading = dict(
            states=(count,), empty_states=(), pooled=(count,), empty_pooled=(), levels=(self.variants, count)
        )
        names = ["states", "empty_states"]
        for optional in (("pooled", "empty_pooled"), ("levels",)):
            if any(is_file(self.path / f"{n}.npy") if self.listed is None else n in self.listed for n in optional):
                names += optional
        return {name: self._rows(name, leading[name]) for name in names}

    def _rows(self, name: str, leading: tuple[int, ...]) -> Rows:
        return Store(self.path, self.dtype).rows(name, leading, checked=self.listed is not None)

    def _read(self, array: Rows, *index: int) -> np.ndarray:
        """A row, in the cache's dtype."""
        with told(array.path):
            return array[index].view(Store(self.path, self.dtype).dtype)

    def read(self, rows: Int[np.ndarray, " b"], bucket: Bucket, epoch: int) -> CachedBatch:
        """The `CachedBatch` of dataset indices `rows` `[b]`."""
        chances = [draw(self.config, epoch, int(row)) for row in rows]
        arrays, variant = self._arrays, epoch % self.variants
        name = moments_name(bucket)
        if name not in self._moments:
            self._moments[name] = self._rows(name, (self.variants, int(self._members[self.bucket_of[rows[0]]])))
        moments = self._moments[name]

        def text(name: str) -> np.ndarray:
            empty = self._read(arrays[f"empty_{name}"])
            own = (self._read(arrays[name], int(row)) for row in rows)
            return np.stack([empty if c.drop_text else x for c, x in zip(chances, own, strict=True)])

        levels = None
        if "levels" in arrays:
            stacked = np.stack([self._read(arrays["levels"], variant, int(row)) for row in rows])
            levels = tuple(np.array(stacked[:, n, None]) for n in range(stacked.shape[1]))
        return CachedBatch(
            moments=np.stack([self._read(moments, variant, int(slot)) for slot in self._slot[rows]]),
            states=text("states"),
            pooled=text("pooled") if "pooled" in arrays else None,
            levels=levels,
            keep_image=np.array([not c.drop_image for c in chances], np.float32),
            row=np.asarray(rows, np.int32),
        )


def slots(bucket_of: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """For each row, how many rows before it are in the same bucket."""
    place = np.zeros(len(bucket_of), np.int64)
    for bucket in np.unique(bucket_of):
        members = np.flatnonzero(bucket_of == bucket)
        place[members] = np.arange(len(members))
    return place
