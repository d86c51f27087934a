"""Stage `base`: the transformer, text to image."""

from __future__ import annotations

from pathlib import Path

from train.export import export
from train.shapeland.configs import BASE, FURTHER, with_steps
from train.shapeland.runs import run
from train.shapeland.workdir import SHIPPED

MORE = 2400  # steps of a base that is not fresh


def train_base(folder: Path, seed: int, fresh: bool = True) -> None:
    """Trains the transformer of the bundle of stage `encoders`, then writes a bundle with it.

    `fresh`: from random weights; otherwise that transformer is trained further.
    """
    config = BASE if fresh else with_steps(FURTHER, MORE)
    root = folder.parent
    export(
        run(config, folder, seed, root / "encoders" / "bundle", root / "world" / "scenes"),
        None,
        folder / "bundle",
        dtype=SHIPPED,
        overwrite=True,
    )
