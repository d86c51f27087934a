"""A run that starts from the weights of an adapter."""

import dataclasses

import jax
import numpy as np
import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.testing import make_bundle
from tests.train.runs import fixed, losses
from train.config import TrainConfig
from train.export import export
from train.loop import train
from train.run import Run


@pytest.fixture(scope="module")
def adapter(adapter_run, tmp_path_factory):
    """The exported adapter of a run at 64 pixels, and the state it is of."""
    workdir, state = adapter_run
    folder = tmp_path_factory.mktemp("adapters") / "first"
    export(workdir, folder, None)
    return folder, state


def larger(config, **changes):
    """The recipe at twice the resolution, from the adapter of the smaller one."""
    data = dataclasses.replace(config.data, resolution=128)
    return fixed(dataclasses.replace(config, data=data), steps=2, save_every=1, **changes)


def test_the_average_is_what_the_next_run_starts_from(config, adapter, tmp_path):
    """At another resolution, with a fresh optimizer and step; the recipe that 512 and 1024 pixels are to FLUX.1."""
    folder, before = adapter
    run = larger(config, init_adapter=str(folder))
    state = Run(run).fresh_state()
    for part in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, part["adapter"], before.ema["adapter"])
    assert int(state.step) == 0 and not any(np.any(x) for x in jax.tree.leaves(state.opt_state))
    train(run, tmp_path / "warm")
    train(larger(config), tmp_path / "cold")
    assert losses(tmp_path / "warm")[0] != losses(tmp_path / "cold")[0]


def test_a_resumption_goes_on_from_its_checkpoint(config, adapter, tmp_path):
    """Though the adapter is gone."""
    folder, _ = adapter
    run = larger(config, init_adapter=str(folder))
    straight = train(run, tmp_path / "straight")
    train(dataclasses.replace(run, steps=1), tmp_path / "cut")
    again = train(dataclasses.replace(run, init_adapter="/gone"), tmp_path / "cut", resume=True)
    jax.tree.map(np.testing.assert_array_equal, again.params, straight.params)


def test_what_does_not_fit_is_refused(config, adapter, tmp_path):
    folder, _ = adapter
    make_bundle(tmp_path / "other")
    manifest = (tmp_path / "other" / "bundle.json").read_text()
    fingerprint = Run(config).bundle.fingerprint
    (tmp_path / "other" / "bundle.json").write_text(manifest.replace(fingerprint, "5" * 64))
    wide = dataclasses.replace(config.adapter, expert_width=32, merge="concat")
    for changes, found in (
        (dict(init_adapter=str(tmp_path)), "`init_adapter` .*: no adapter.json in it"),
        (dict(init_adapter=str(folder), bundle=str(tmp_path / "other")), "`init_adapter` .*: made for another base"),
        (dict(init_adapter=str(folder), adapter=wide), "hmoe.expert_width: 64 -> 32; merge: 'sum' -> 'concat'"),
    ):
        with pytest.raises(UserError, match=found):
            train(larger(config, **changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="`init_adapter` x: `trainable` base has no adapter"):
        TrainConfig(init_adapter="x", trainable="base")
