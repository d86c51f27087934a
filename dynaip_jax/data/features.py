"""Precomputed features: what the frozen encoders make of a dataset, so that training holds the MM-DiT and the adapter alone.

A folder holds `features.json` (what they were made of) and NumPy files, read by memory mapping: a row's T5 states, its CLIP pooled
text, and, `variants` times with different augmentation, its VAE moments and CLIP levels. bfloat16 is stored as its bits.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dynaip_jax.data.order import Bucket, Plan
from dynaip_jax.data.samples import DataConfig, draw
from dynaip_jax.errors import UserError
from dynaip_jax.storage.folders import reserve

FILE, FORMAT, VERSION = "features.json", "dynaip-features", 1
SHAPING = (  # fields of DataConfig that change what is stored
    "resolution", "aspects", "clip_size", "square", "remove_background", "crop_reference", "flip_reference", "flip_target", "seed",
)  # fmt: skip


class CachedBatch(NamedTuple):
    """One process's part of a global batch, as the encoders left it."""

    moments: np.ndarray  # [b, h, w, 2z] of the VAE
    states: np.ndarray  # [b, t, c] of T5; of the empty prompt where the text is dropped
    pooled: np.ndarray  # [b, c] of CLIP text, likewise
    levels: tuple[np.ndarray, ...] | None  # three of [b, 1, m, c] of CLIP vision; None in a cache for a base
    keep_image: np.ndarray  # float32 [b]: 0 where the image prompt is dropped, otherwise 1
    row: np.ndarray  # int32 [b]: index into the dataset


def facts(config: DataConfig, plan: Plan, encoders: str, dtype: str) -> dict[str, Any]:
    """What a cache depends on: rows and buckets, augmentation, encoders (an identity of theirs), precision."""
    shaping = {name: getattr(config, name) for name in SHAPING}
    return json.loads(json.dumps(dict(plan=plan.fingerprint, data=shaping, encoders=encoders, dtype=dtype)))


class Store:
    """The arrays of a cache folder by name; they are created by `create`, then opened by `array`."""

    def __init__(self, folder: Path, dtype: str):
        self.folder, self.dtype = folder, np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def create(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A new array on disk."""
        bits = np.dtype(np.uint16) if self.dtype.itemsize == 2 else self.dtype
        path = self.folder / f"{name}.npy"
        array = np.lib.format.open_memmap(path, "w+", bits, shape)
        reserve(path)
        return array.view(self.dtype)

    def array(self, name: str) -> np.ndarray:
        """An array that is there, read-only. Raises `UserError` if it is not, or damaged."""
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False).view(self.dtype)
        except (OSError, ValueError, EOFError) as e:
            raise UserError(
                f"{path}: cannot be read ({e}); expected what python -m train.cache wrote; run it again"
            ) from e


def moments_name(bucket: Bucket) -> str:
    """Name of the array that holds the VAE moments of a bucket's rows."""
    return f"moments_{bucket.height}x{bucket.width}"


@dataclasses.dataclass(frozen=True)
class Cached:
    """Reads a cache folder; see `sources.Reader`. Sample for sample what `sources.Pictures` and the encoders would make,
    but that the augmentation of epoch e is that of epoch e modulo `variants`."""

    dataset: Any
    config: DataConfig
    bucket_of: np.ndarray = dataclasses.field(repr=False)  # [n], of the plan
    path: Path
    dtype: str
    variants: int

    @classmethod
    def open(cls, config: DataConfig, dataset: Any, plan: Plan, encoders: str) -> Cached:
        """Checks the folder `config.features` against what training asks for. Raises `UserError` if it does not fit."""
        path = Path(config.features)
        try:
            stored = json.loads((path / FILE).read_text())
            if stored["format"] != FORMAT or stored["format_version"] != VERSION:
                raise ValueError(f"format {stored['format']} {stored['format_version']}, expected {FORMAT} {VERSION}")
            dtype, variants, found = stored["facts"]["dtype"], stored["variants"], stored["facts"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"--data.features {path}: no readable {FILE} ({e}); expected a folder made by python -m train.cache"
            ) from e
        wanted = facts(config, plan, encoders, dtype)
        flat = [{**{k: v for k, v in f.items() if k != "data"}, **f["data"]} for f in (found, wanted)]
        for name, value in flat[1].items():
            if flat[0].get(name) != value:
                raise UserError(
                    f"--data.features {path}: made with {name} {flat[0].get(name)!r}; this run has {value!r}; "
                    "make the cache again with this run's options"
                )
        return cls(dataset, config, plan.bucket_of, path, dtype, variants)

    @cached_property
    def _slot(self) -> np.ndarray:
        """Position of each row among those of its bucket."""
        return slots(self.bucket_of)

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        store = Store(self.path, self.dtype)
        with_levels = ("levels",) if (self.path / "levels.npy").is_file() else ()
        names = ("states", "pooled", "empty_states", "empty_pooled", *with_levels)
        return {name: store.array(name) for name in names}

    def read(self, rows: np.ndarray, bucket: Bucket, epoch: int) -> CachedBatch:
        """The `CachedBatch` of dataset indices `rows` `[b]`."""
        chances = [draw(self.config, epoch, int(row)) for row in rows]
        arrays, variant = self._arrays, epoch % self.variants
        moments = Store(self.path, self.dtype).array(moments_name(bucket))

        def text(name: str) -> np.ndarray:
            empty = arrays[f"empty_{name}"]
            return np.stack([empty if c.drop_text else arrays[name][row] for c, row in zip(chances, rows, strict=True)])

        levels = None
        if "levels" in arrays:
            found = arrays["levels"][variant, rows]
            levels = tuple(np.array(found[:, n, None]) for n in range(found.shape[1]))
        return CachedBatch(
            moments=np.array(moments[variant, self._slot[rows]]),
            states=text("states"),
            pooled=text("pooled"),
            levels=levels,
            keep_image=np.array([not c.drop_image for c in chances], np.float32),
            row=np.asarray(rows, np.int32),
        )


def slots(bucket_of: np.ndarray) -> np.ndarray:
    """For each row, how many rows before it are in the same bucket."""
    found = np.zeros(len(bucket_of), np.int64)
    for bucket in np.unique(bucket_of):
        members = np.flatnonzero(bucket_of == bucket)
        found[members] = np.arange(len(members))
    return found
