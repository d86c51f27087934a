"""Several datasets as one, whose rows are those of the first, then of the second, and so on."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dynaip_jax.data.config import DataConfig
from dynaip_jax.data.records import Dataset, Record, open_dataset


class Mixture(Dataset):
    """`datasets` one after the other; see `Dataset`. `path` names all of them, for messages.

    Where one dataset has a path and plain arrays, this has text and properties that join them when they are asked for.
    """

    def __init__(self, datasets: Sequence[Dataset]):
        self.datasets = tuple(datasets)
        self.path = " + ".join(str(dataset.path) for dataset in datasets)
        contents = [dataset.content for dataset in datasets]
        self.content = hashlib.sha256(repr(contents).encode()).hexdigest() if all(contents) else ""
        self._ends = np.cumsum([len(dataset) for dataset in datasets]).tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.datasets,)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> Record:
        number = bisect.bisect_right(self._ends, row)
        return self.datasets[number][row - (self._ends[number - 1] if number else 0)]

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.concatenate([dataset.sizes for dataset in self.datasets])

    @cached_property
    def numbers(self) -> np.ndarray:
        return np.concatenate([dataset.numbers for dataset in self.datasets])

    @cached_property
    def masked(self) -> np.ndarray:
        return np.concatenate([dataset.masked for dataset in self.datasets])


def open_data(config: DataConfig) -> Dataset:
    """The dataset in `config.path`, with those in `config.also` behind it. Errors as in `Dataset`."""
    datasets = [open_dataset(path) for path in (config.path, *config.also)]
    return datasets[0] if len(datasets) == 1 else Mixture(datasets)


def shares(config: DataConfig, dataset: Dataset) -> list[tuple[int, float]]:
    """How many rows each dataset of a mixture has, and its weight; nothing where all rows count alike."""
    if not isinstance(dataset, Mixture) or set(config.weights) <= {1.0}:
        return []
    return [(len(part), weight) for part, weight in zip(dataset.datasets, config.weights, strict=True)]
