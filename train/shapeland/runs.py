"""A run of the trainer within a stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from train.cache import cache
from train.config import TrainConfig
from train.loop import train


def run(
    config: TrainConfig, folder: Path, seed: int, bundle: Path, records: Path, features: Path | None = None
) -> Path:
    """Caches the features of the dataset `records`, trains on them and returns the run's folder.

    Features go to `features`, by default `folder`/features, unless they exist. Raises `KeyboardInterrupt` if the run was asked to
    stop before its last step, so that the stage does not count as done.
    """
    data = dataclasses.replace(config.data, path=str(records), seed=seed)
    config = dataclasses.replace(config, bundle=str(bundle), seed=seed, data=data)
    features = features or folder / "features"
    if not features.exists():
        cache(config, features)
    config = dataclasses.replace(config, data=dataclasses.replace(data, features=str(features)))
    state = train(config, folder / "run", resume=True)
    if int(state.step) < config.steps:
        raise KeyboardInterrupt
    return folder / "run"
