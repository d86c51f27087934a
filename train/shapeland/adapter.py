"""Stage `adapter`: the adapter on scenes of one subject, the base frozen."""

from __future__ import annotations

from pathlib import Path

from train.export import export
from train.shapeland.configs import ADAPTER
from train.shapeland.runs import run
from train.shapeland.workdir import SHIPPED


def train_adapter(folder: Path, seed: int) -> None:
    """Trains the adapter on the bundle of stage `base` and exports it."""
    root = folder.parent
    done = run(ADAPTER, folder, seed, root / "base" / "bundle", root / "world" / "pairs")
    export(done, folder / "adapter", None, dtype=SHIPPED, overwrite=True)
