"""Stage `world`: the trainer's datasets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from dynaip_jax.data.records import Record, write_dataset
from dynaip_jax.shapeland.dataset import pair_record, scene_record
from dynaip_jax.storage.folders import replacing
from train.shapeland.processes import in_processes

SCENES, PAIRS = 24_000, 16_000  # records


def write_world(folder: Path, seed: int) -> None:
    """The two datasets of the trainer: scenes for the base, pairs of one subject for the adapter."""
    write_records(folder / "scenes", partial(scene_record, seed), SCENES)
    write_records(folder / "pairs", partial(pair_record, seed), PAIRS)


def write_records(folder: Path, make: Callable[[int], Record], count: int) -> None:
    """Writes a dataset of `make(n)` for n below `count`."""
    with replacing(folder, overwrite=True, marks=("index.npz",)) as work:
        write_dataset(work, in_processes(make, count))
