"""Precomputed features: what the frozen encoders make of a dataset, so that training holds the MM-DiT and the adapter alone.

A folder holds `features.json` (what they were made of) and NumPy files, read by memory mapping: the states of each row's text,
its pooled text if the family has any, and, `variants` times with different augmentation, its VAE moments and CLIP levels. bfloat16
is stored as its bits.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int, Int32

from dynaip_jax.data.config import Bucket, DataConfig
from dynaip_jax.data.order import BatchOrder
from dynaip_jax.data.records import Dataset
from dynaip_jax.data.samples import draw
from dynaip_jax.errors import UserError
from dynaip_jax.storage.folders import is_bucket, reserve

FILE, FORMAT, VERSION = "features.json", "dynaip-features", 1
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
        """An array of the folder, read-only. Raises `UserError` if it is missing or damaged."""
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
    """Reads a cache folder; see `samples.Reader`. Sample for sample what `samples.Pictures` and the encoders would make,
    but that the augmentation of epoch e is that of epoch e modulo `variants`."""

    dataset: Dataset
    config: DataConfig
    bucket_of: Int[np.ndarray, " n"] = dataclasses.field(repr=False)  # of the batch order
    path: Path
    dtype: str
    variants: int

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
            stored = json.loads((path / FILE).read_text())
            if stored["format"] != FORMAT or stored["format_version"] != VERSION:
                raise ValueError(f"format {stored['format']} {stored['format_version']}, expected {FORMAT} {VERSION}")
            dtype, variants, made_of = stored["facts"]["dtype"], stored["variants"], stored["facts"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"`data.features` {path}: no readable {FILE} ({e}); expected a folder made by python -m train.cache"
            ) from e
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
            if flat[0].get(name) != value:
                raise UserError(
                    f"`data.features` {path}: made with {name} {flat[0].get(name)!r}; this run has {value!r}; "
                    "make the cache again with this run's options"
                )
        return cls(dataset, config, order.bucket_of, path, dtype, variants)

    @cached_property
    def _slot(self) -> np.ndarray:
        """Position of each row among those of its bucket."""
        return slots(self.bucket_of)

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        store = Store(self.path, self.dtype)
        names = ["states", "empty_states"]
        for optional in (("pooled", "empty_pooled"), ("levels",)):
            if any((self.path / f"{name}.npy").is_file() for name in optional):
                names += optional
        return {name: store.array(name) for name in names}

    def read(self, rows: Int[np.ndarray, " b"], bucket: Bucket, epoch: int) -> CachedBatch:
        """The `CachedBatch` of dataset indices `rows` `[b]`."""
        chances = [draw(self.config, epoch, int(row)) for row in rows]
        arrays, variant = self._arrays, epoch % self.variants
        moments = Store(self.path, self.dtype).array(moments_name(bucket))

        def text(name: str) -> np.ndarray:
            empty = arrays[f"empty_{name}"]
            return np.stack([empty if c.drop_text else arrays[name][row] for c, row in zip(chances, rows, strict=True)])

        levels = None
        if "levels" in arrays:
            stacked = arrays["levels"][variant, rows]
            levels = tuple(np.array(stacked[:, n, None]) for n in range(stacked.shape[1]))
        return CachedBatch(
            moments=np.array(moments[variant, self._slot[rows]]),
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
