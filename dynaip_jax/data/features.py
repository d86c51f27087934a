"""Precomputed features: what the frozen encoders make of a dataset, so that training holds the MM-DiT and the adapter alone.

A folder holds `features.json` (what they were made of) and parts of `ROWS_A_PART` rows each, in the dataset's order. A part holds `part.json` and
NumPy files, read row by row and compared with checksums (`cached.py`): the states of each row's text, its pooled text if the family
has any, both of the empty prompt, and, `variants` times with different augmentation, its VAE moments and CLIP levels. bfloat16 is
stored as its bits. Caches of before there were parts are one part without `part.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Int

from dynaip_jax.choices import DTYPES
from dynaip_jax.data.config import Bucket, DataConfig
from dynaip_jax.data.order import BatchOrder
from dynaip_jax.errors import UserError, reason, shortened
from dynaip_jax.reading import JSON_BYTES, parse_json, read_bytes
from dynaip_jax.schema import typed
from dynaip_jax.storage.arrays import Rows, crc32, read_array
from dynaip_jax.storage.folders import reserve

FILE, FORMAT, VERSION, WHOLE = "features.json", "dynaip-features", 2, 1  # WHOLE: the version of caches without parts
PART = "part.json"
ROWS_A_PART = 2048
CHECKS = ".checks.npy"  # after the name of an array: the checksums of its rows
SHAPING = (  # fields of DataConfig that change what is stored
    "resolution", "aspects", "clip_size", "square", "remove_background", "crop_reference", "flip_reference", "flip_target", "seed",
)  # fmt: skip


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


def parts(rows: int) -> int:
    """How many parts `rows` rows make."""
    return math.ceil(rows / ROWS_A_PART)


def part_name(number: int) -> str:
    """The folder of a part within a cache, or among the finished parts of one that is being made."""
    return f"part-{number:06d}"


def cache_key(made_of: Mapping[str, Any], variants: int, rows_a_part: int) -> str:
    """By what the parts of a cache are known as its own."""
    return _digest(dict(version=VERSION, facts=made_of, variants=variants, rows_a_part=rows_a_part))


def write_part(folder: Path, key: str, number: int, bucket_of: Int[np.ndarray, " n"]) -> None:
    """Writes `part.json`, which ends the part of this `number`: what it is, and for each row the index of its bucket in the batch order."""
    arrays = sorted(file.name.removesuffix(CHECKS) for file in folder.glob(f"*{CHECKS}"))
    content = dict(key=key, number=number, arrays=arrays, bucket_of=[int(bucket) for bucket in bucket_of])
    (folder / PART).write_text(json.dumps(content | dict(checksum=_digest(content))) + "\n")


def read_part(folder: Path, key: str, number: int) -> tuple[list[str], Int[np.ndarray, " n"]]:
    """Names of a part's arrays, and the index of each row's bucket. Raises `ValueError` or `OSError` if it is damaged, or another."""
    stated = typed(dict[str, Any], parse_json(read_bytes(folder / PART, JSON_BYTES)), PART)
    _check_digest(stated)
    if (stated.get("key"), stated.get("number")) != (key, number):
        raise ValueError("it is a part of another cache, or another part of this one")
    names = typed(tuple[str, ...], stated.get("arrays"), "arrays")
    buckets = typed(tuple[int, ...], stated.get("bucket_of"), "bucket_of")
    if not all(0 <= bucket < 1 << 15 for bucket in buckets):
        raise ValueError("bucket_of holds what is no index")
    return list(names), np.array(buckets, np.int64)


def write_facts(folder: Path, made_of: Mapping[str, Any], variants: int) -> None:
    """Writes `features.json`, which ends a cache: what it was made of, in how many `variants`, and how many rows a part has."""
    content = dict(format=FORMAT, format_version=VERSION, variants=variants, facts=made_of, rows_a_part=ROWS_A_PART)
    (folder / FILE).write_text(json.dumps(content | dict(checksum=_digest(content)), indent=2) + "\n")


KINDS = dict(format=str, format_version=int, variants=int, facts=dict[str, Any], checksum=str)
KINDS_OF = {VERSION: KINDS | dict(rows_a_part=int), WHOLE: KINDS | dict(arrays=tuple[str, ...])}


def read_facts(path: Path) -> dict[str, Any]:
    """The content of `features.json`. Raises `ValueError` or `OSError` for anything else than `write_facts` writes; caches without
    parts are read, and those of before checksums."""
    stored = typed(dict[str, Any], parse_json(read_bytes(path / FILE, JSON_BYTES)), FILE)
    version = stored.get("format_version")
    if stored.get("format") != FORMAT or isinstance(version, bool) or version not in (VERSION, WHOLE):
        version = shortened(f"{stored.get('format')} {version}", 60)
        raise ValueError(f"format {version}, expected {FORMAT} {WHOLE} or {VERSION}")
    kinds, spared = KINDS_OF[version], {"arrays", "checksum"} if version == WHOLE else set()
    if (wrong := stored.keys() ^ kinds.keys()) - spared:
        raise ValueError(f"{min(wrong)!r} is missing or unknown")
    for name, value in stored.items():
        typed(kinds[name], value, name)
    typed(dict[str, Any], stored["facts"].get("data"), "data")
    if stored["variants"] < 1 or stored["facts"].get("dtype") not in DTYPES:
        raise ValueError(f"{stored['variants']} variants of {shortened(repr(stored['facts'].get('dtype')), 40)}")
    if version == VERSION or "arrays" in stored:
        _check_digest(stored)
    if stored.get("rows_a_part", 1) < 1:
        raise ValueError(f"parts of {stored['rows_a_part']} rows")
    return stored


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_digest(stated: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless the checksum in a file is that of the rest."""
    if stated.get("checksum") != _digest({k: v for k, v in stated.items() if k != "checksum"}):
        raise ValueError("its checksum is another: it was damaged or changed")


def moments_name(bucket: Bucket) -> str:
    """Name of the array that holds the VAE moments of a bucket's rows."""
    return f"moments_{bucket.height}x{bucket.width}"


def slots(bucket_of: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """For each row, how many rows before it are in the same bucket."""
    place = np.zeros(len(bucket_of), np.int64)
    for bucket in np.unique(bucket_of):
        members = np.flatnonzero(bucket_of == bucket)
        place[members] = np.arange(len(members))
    return place
