"""Stage `world`: the trainer's datasets."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dynaip_jax.data.records import Record, write_dataset
from dynaip_jax.errors import UserError
from dynaip_jax.shapeland.dataset import UNSAID, pair_record, scene_record
from dynaip_jax.storage.folders import replacing
from dynaip_jax.storage.renames import write_new
from train.shapeland.processes import in_processes

CAPTIONS = "captions.json"  # how captions were written
SCENES, PAIRS = 28_000, 20_000  # records


def write_world(folder: Path, seed: int, unsaid: float = UNSAID) -> None:
    """The two datasets of the trainer: scenes for the base, pairs of one subject for the adapter. `unsaid`: the probability that a caption leaves
    something open."""
    write_new(folder / CAPTIONS, json.dumps(dict(unsaid=unsaid)).encode())
    write_records(folder / "scenes", partial(scene_record, seed, unsaid=unsaid), SCENES)
    write_records(folder / "pairs", partial(pair_record, seed, unsaid=unsaid), PAIRS)


def check_world(folder: Path, unsaid: float) -> None:
    """Raises `UserError` if the captions in a folder of `write_world` were written with another `unsaid`."""
    file = folder / CAPTIONS
    if file.is_file() and (found := json.loads(file.read_text())["unsaid"]) != unsaid:
        raise UserError(
            f"`describe_everything`: captions in {folder} leave each part open with probability {found:g}, expected {unsaid:g}; "
            "call it as before, or choose another `workdir`"
        )


def write_records(folder: Path, make: Callable[[int], Record], count: int) -> None:
    """Writes a dataset of `make(n)` for n below `count`."""
    with replacing(folder, overwrite=True, marks=("index.npz",)) as work:
        write_dataset(work, in_processes(make, count))
