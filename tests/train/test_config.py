"""Configs: which fields may differ when a run goes on."""

import dataclasses

from dynaip_jax.data.config import DataConfig
from train.config import TrainConfig, differing, moved

FREE = {
    "bundle", "init_adapter", "steps", "log_every", "save_every", "keep", "sample", "mesh", "distributed", "validation", "profile",
}  # fmt: skip


def test_fields_that_may_differ_on_resumption_say_so():
    assert {f.name for f in dataclasses.fields(TrainConfig) if f.metadata.get("resumable") is True} == FREE
    config = TrainConfig()
    free = dataclasses.replace(
        config, steps=7, keep=5, sample=dataclasses.replace(config.sample, every=3),
        data=dataclasses.replace(config.data, workers=9, prefetch=3),
    )  # fmt: skip
    assert differing(config, free) == []
    bound = dataclasses.replace(
        config, batch=32, seed=1, data=dataclasses.replace(config.data, seed=3), optim=dataclasses.replace(config.optim, rate=1.0)
    )  # fmt: skip
    assert differing(config, bound) == [
        "batch: 16 -> 32", "data.seed: 0 -> 3", "optim.rate: 0.0001 -> 1.0", "seed: 0 -> 1",
    ]  # fmt: skip


def test_paths_may_differ_and_are_told():
    """What lies there is known by its content. A cache of features may move, but neither come nor go."""
    config = TrainConfig(bundle="a", data=DataConfig(path="b", features="c"))
    other = dataclasses.replace(config, bundle="a/", data=DataConfig(path="x/b/", features="y"))
    assert differing(config, other) == []
    assert moved(config, other) == ["data.path: b -> x/b", "data.features: c -> y"]
    without = dataclasses.replace(config, data=DataConfig(path="b"))
    assert differing(config, without) == ["data.features: 'c' -> ''"]
