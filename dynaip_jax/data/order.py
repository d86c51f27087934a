"""Which rows make up which batch: an order that every process works out for itself.

Pure functions of (sizes, buckets, global batch, seed): no state, no communication. Rows are indices into the dataset.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from dynaip_jax.data.config import Bucket, DataConfig, buckets
from dynaip_jax.data.mixture import shares
from dynaip_jax.data.records import Dataset
from dynaip_jax.errors import UserError

ROWS = np.int32  # indices of rows: half the memory of int64, and the same shuffles
PART = 1 << 20  # rows that are looked at together


class Step(NamedTuple):
    """The global batch of one training step: `rows` int `[global batch]`, all of one `bucket`."""

    epoch: int
    bucket: Bucket
    rows: Int[np.ndarray, " global_batch"]


class Steps(Protocol):
    """What a loader asks of an order."""

    buckets: tuple[Bucket, ...]

    @property
    def fingerprint(self) -> str:
        """Of what gives the number of a step its meaning."""

    def step(self, step: int) -> Step:
        """The global batch of this number, from 0."""


class BatchOrder:
    """The order of training: an epoch is shuffled, cut into global batches of one bucket each, and those are shuffled.

    `sizes` int `[n, 2]`: height and width of each row's target. A row goes to the bucket nearest in log aspect ratio. In
    each epoch the rows that do not fill a batch in their bucket are left out, other ones every time. A bucket with too
    few rows for even one batch is given up and its rows go to the next nearest; `warnings` says so. No row occurs twice
    in an epoch, but where `shares` ask for it: how many rows each of several datasets has, and how often an epoch takes them. Raises `UserError` if there are fewer rows than `global_batch`.
    """

    def __init__(
        self,
        sizes: Int[np.ndarray, "n 2"],
        shapes: Sequence[Bucket],
        global_batch: int,
        seed: int,
        shares: Sequence[tuple[int, float]] = (),
    ):
        if global_batch < 1:
            raise UserError(f"batch size {global_batch}: expected at least 1")
        if len(sizes) < global_batch:
            raise UserError(
                f"dataset: {len(sizes)} rows for a global batch of {global_batch}; expected at least one batch; "
                "add rows or make the batch smaller"
            )
        self.seed, self.global_batch = seed, global_batch
        self.warnings: list[str] = []
        self._lock = Lock()
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.bucket_of, kept = self._assign(sizes, list(shapes))
        self.buckets = tuple(kept)
        self._members = [np.flatnonzero(self.bucket_of == b).astype(ROWS) for b in range(len(kept))]
        self._shares = tuple(shares)
        self.steps_per_epoch = sum(self.count_in(b) // global_batch for b in range(len(kept)))
        if not self.steps_per_epoch:
            raise UserError(
                f"`data.weights`: an epoch fills no batch of {global_batch}; expected one; raise them, or make the batch smaller"
            )
        facts = hashlib.sha256(repr((self.buckets, global_batch, seed, *self._shares)).encode())
        for part in _parts(sizes):
            facts.update(np.ascontiguousarray(part, np.int32).data)
        self.fingerprint = facts.hexdigest()[:16]

    def _assign(self, sizes: np.ndarray, shapes: list[Bucket]) -> tuple[np.ndarray, list[Bucket]]:
        """The bucket of each row, and the buckets that fill at least one batch."""
        nearest = np.empty(len(sizes), np.int8 if len(shapes) < 128 else np.int16)
        while True:
            centres, done = np.log([s.width / s.height for s in shapes]), 0
            for part in _parts(sizes):
                ratio = np.log(part[:, 1] / part[:, 0])
                nearest[done : done + len(part)] = np.abs(ratio[:, None] - centres).argmin(axis=1)
                done += len(part)
            counts = np.bincount(nearest, minlength=len(shapes))
            if counts.min() >= self.global_batch:
                return nearest, shapes
            poorest = int(counts.argmin())
            if counts[poorest]:
                self.warnings.append(
                    f"bucket {shapes[poorest].name}: {counts[poorest]} rows do not fill a batch of {self.global_batch}; "
                    "they are cropped to the next nearest shape"
                )
            del shapes[poorest]

    def count_in(self, bucket: int) -> int:
        """How many rows an epoch takes from the bucket of this index, before those that fill no batch are left out."""
        if not self._shares:
            return len(self._members[bucket])
        return sum(round(weight * len(rows)) for rows, weight in self._weighted(bucket))

    def _weighted(self, bucket: int) -> Iterator[tuple[np.ndarray, float]]:
        """Rows of a bucket that are of one dataset, and its weight."""
        ends = np.cumsum([rows for rows, _ in self._shares])
        parts = np.split(self._members[bucket], np.searchsorted(self._members[bucket], ends[:-1]))
        return zip(parts, (weight for _, weight in self._shares), strict=True)

    def _drawn(self, bucket: int, rng: np.random.Generator) -> np.ndarray:
        """The rows of a bucket in one epoch: each as often as its weight says, and by chance once more for what is left of that."""
        if not self._shares:
            return self._members[bucket]
        drawn = []
        for rows, weight in self._weighted(bucket):
            times, more = divmod(round(weight * len(rows)), max(1, len(rows)))
            drawn += [rows] * times + [rng.permutation(rows)[:more]]
        return np.concatenate(drawn)

    def rows_in(self, bucket: int) -> Int[np.ndarray, " n"]:
        """Rows of the bucket of this index."""
        return self._members[bucket]

    def step(self, step: int) -> Step:
        """The global batch of training step `step`, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        with self._lock:  # threads that come to a new epoch together shuffle it once
            if epoch not in self._epochs:
                for old in sorted(self._epochs)[:-1]:  # at the border of two epochs, threads ask for both
                    del self._epochs[old]
                self._epochs[epoch] = self.shuffled(epoch)
            rows, bucket = self._epochs[epoch]
        return Step(epoch, self.buckets[bucket[place]], rows[place])

    def shuffled(self, epoch: int) -> tuple[Int[np.ndarray, "steps global_batch"], Int[np.ndarray, " steps"]]:
        """All of an epoch: rows `[steps, global batch]` and the index of each batch's bucket `[steps]`."""
        rng = np.random.default_rng((self.seed, epoch))
        batches = []
        for number in range(len(self.buckets)):
            members = self._drawn(number, rng)
            full = len(members) // self.global_batch * self.global_batch
            batches.append(rng.permutation(members)[:full].reshape(-1, self.global_batch))
        bucket = np.repeat(np.arange(len(batches), dtype=self.bucket_of.dtype), [len(b) for b in batches])
        order = rng.permutation(len(bucket))
        return np.concatenate(batches)[order], bucket[order]


def make_order(config: DataConfig, dataset: Dataset, global_batch: int) -> BatchOrder:
    """The order in which the rows of `dataset` are trained on. Errors as in `BatchOrder`; its warnings are given."""
    shapes = buckets(config.resolution, config.aspects)
    order = BatchOrder(dataset.sizes, shapes, global_batch, config.seed, shares(config, dataset))
    for line in order.warnings:
        warnings.warn(f"dataset {dataset.path}: {line}", stacklevel=2)
    return order


def _parts(sizes: np.ndarray) -> Iterator[np.ndarray]:
    """`sizes`, some rows at a time."""
    return (sizes[start : start + PART] for start in range(0, len(sizes), PART))
