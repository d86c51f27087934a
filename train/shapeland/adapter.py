"""Stage `adapter`: the adapter on scenes of one subject, the base frozen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from train.export import export
from train.shapeland.configs import ADAPTER, with_steps
from train.shapeland.runs import run
from train.shapeland.workdir import SHIPPED

MORE = 1000  # steps of an adapter that is not fresh


def train_adapter(folder: Path, seed: int, fresh: bool = True) -> None:
    """Trains the adapter on the bundle of stage `base` and exports it.

    `fresh`: from random weights; otherwise the adapter that was trained together with that base is trained further.
    """
    base, config = folder.parent / "base", ADAPTER
    if not fresh:
        config = with_steps(dataclasses.replace(ADAPTER, init_adapter=str(base / "adapter")), MORE)
    done = run(config, folder, seed, base / "bundle", folder.parent / "world" / "pairs")
    export(done, folder / "adapter", None, dtype=SHIPPED, overwrite=True)
