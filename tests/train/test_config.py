"""Configs: which fields may differ when a run goes on."""

import dataclasses

from train.config import TrainConfig, differing

FREE = {"steps", "log_every", "save_every", "keep", "sample", "mesh", "distributed", "validation", "profile"}


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
