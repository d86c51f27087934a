"""The stages of Shapeland's training, and how they run: in order, each in its own folder, resumed where they were cut off."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax

from dynaip_jax.errors import UserError
from dynaip_jax.storage.locks import hold
from dynaip_jax.storage.renames import write_new
from train.shapeland.adapter import train_adapter
from train.shapeland.base import train_base
from train.shapeland.clip import train_clip
from train.shapeland.encoders import keep_bundle, write_encoders
from train.shapeland.judge import train_judge
from train.shapeland.ship import ship
from train.shapeland.text import train_text
from train.shapeland.vae import train_vae
from train.shapeland.variants import train_variants
from train.shapeland.workdir import DONE, SPENT
from train.shapeland.world import write_world

Stage = Callable[[Path, int], None]  # (its folder, seed); the folders of earlier stages lie beside it

TRAINED: dict[str, Stage] = dict(
    world=write_world, vae=train_vae, clip=train_clip, text=train_text, encoders=write_encoders, base=train_base,
    judge=train_judge, adapter=train_adapter,
)  # fmt: skip
SHIP: dict[str, Stage] = dict(ship=partial(ship, stages=list(TRAINED)))
STAGES = TRAINED | SHIP
KEPT: dict[str, Stage] = dict(  # with --go-on: from the models in the package
    world=write_world, encoders=keep_bundle, base=partial(train_base, fresh=False),
    judge=partial(train_judge, fresh=False), adapter=partial(train_adapter, fresh=False), **SHIP,
)  # fmt: skip
EXTRA: dict[str, Stage] = dict(variants=train_variants)  # run only when named


def run_stage(name: str, stage: Stage, workdir: Path, seed: int) -> None:
    """Runs a stage in `workdir`/`name` unless it is done there. Adds up its seconds, also those of runs that were cut off."""
    folder = workdir / name
    if (folder / DONE).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with hold(
        workdir / f".{name}.lock", lambda holder: UserError(f"`workdir` {folder}: {holder} runs this stage; wait")
    ):
        _run_stage(name, stage, folder, seed)


def _run_stage(name: str, stage: Stage, folder: Path, seed: int) -> None:
    start, spent = time.monotonic(), folder / SPENT
    before = float(spent.read_text()) if spent.is_file() else 0.0
    print(f"stage {name}", file=sys.stderr)
    try:
        stage(folder, seed)
    finally:
        seconds = before + time.monotonic() - start
        write_new(spent, f"{seconds:.0f}\n".encode())
    note = dict(stage=name, seed=seed, seconds=round(seconds), device=jax.devices()[0].device_kind)
    write_new(folder / DONE, (json.dumps(note) + "\n").encode())
