"""Stage `base`: the transformer, text to image."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dynaip_jax.shapeland import default
from train.export import export
from train.shapeland.configs import BASE, FURTHER, with_steps
from train.shapeland.runs import run
from train.shapeland.workdir import SHIPPED

MORE = 3000  # steps of a base that is not fresh


def train_base(folder: Path, seed: int, fresh: bool = True) -> None:
    """Trains the transformer of the bundle of stage `encoders`, then writes a bundle with it.

    `fresh`: from random weights; otherwise that transformer is trained further, together with the package's adapter, which is exported too.
    """
    config = BASE if fresh else with_steps(dataclasses.replace(FURTHER, init_adapter=str(default.paths()[1])), MORE)
    root = folder.parent
    done = run(config, folder, seed, root / "encoders" / "bundle", root / "world" / "scenes")
    export(done, None if fresh else folder / "adapter", folder / "bundle", dtype=SHIPPED, overwrite=True)
