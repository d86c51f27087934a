"""The loop: what it trains, and what it leaves alone."""

import dataclasses

import jax

from tests.train.runs import fixed, losses
from train.loop import train
from train.run import Run


def test_a_base_trained_from_scratch_learns_one_batch(config, tmp_path):
    """At least by half within 300 steps; seen: to 0.2 % of the first loss."""
    train(fixed(config, trainable="all", fresh_base=True, steps=150, save_every=150), tmp_path / "run")
    values = losses(tmp_path / "run")
    assert values[-1] < 0.5 * values[0]


def test_an_adapter_learns_on_a_frozen_base(adapter_run):
    """Seen: below 0.7 of the first loss after 120 steps (random base, one batch)."""
    values = losses(adapter_run[0])
    assert len(values) == 120 and values[-1] < 0.85 * values[0]


def test_a_fixed_batch_alone_leaves_noise_and_times_free(config, tmp_path):
    train(dataclasses.replace(config, fixed_batch=True, steps=4, save_every=4), tmp_path / "run")
    values = losses(tmp_path / "run")
    assert max(values) / min(values) > 1.01  # a frozen base and a fresh adapter: other times, other losses


def test_frozen_means_frozen(config, adapter_run):
    _, state = adapter_run
    assert set(state.params) == set(state.ema) == {"adapter"}
    frozen = Run(config).load("transformer")
    sizes = {leaf.size for leaf in jax.tree.leaves(frozen["transformer"])}
    adapter = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments < 2 * adapter + 10 and sizes  # two moments of the adapter and counters: nothing of the base
