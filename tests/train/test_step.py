"""The training step: what is frozen stays, accumulation and drops change only what they should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynaip_jax import flow
from dynaip_jax.adapters.dynaip import DynaIPConfig
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.flux import Flux, FluxConfig
from dynaip_jax.planner import chips, flops
from dynaip_jax.testing import tiny_family
from tests.train.runs import STEP
from train.run import Run
from train.state import init_state
from train.step import _granularity, features_of


def test_the_frozen_arrays_are_the_same_after_steps(setup):
    constants, frozen, state, features = setup
    before = jax.tree.map(lambda x: np.array(x), frozen)
    for _ in range(3):
        state, _ = STEP(constants, state, frozen, features)
    jax.tree.map(np.testing.assert_array_equal, before, frozen)


def test_accumulating_4_times_b_is_4b(setup):
    constants, frozen, state, features = setup
    whole, values = STEP(constants, state, frozen, features)
    parts, same = STEP(dataclasses.replace(constants, accumulate=4), state, frozen, features)
    assert float(values["loss"]) == pytest.approx(float(same["loss"]), rel=1e-6)
    assert float(values["grad_norm"]) == pytest.approx(float(same["grad_norm"]), rel=1e-5)
    moments = [optax.tree_utils.tree_get(s.opt_state, "mu") for s in (whole, parts)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), *moments)


def test_a_dropped_image_prompt_is_exactly_the_base(setup):
    """With every image prompt dropped, the loss does not depend on the adapter and its gradient is zero."""
    constants, frozen, state, features = setup
    state = state._replace(params=jax.tree.map(lambda x: x + 0.3, state.params))
    _, on = STEP(constants, state, frozen, features)
    _, off = STEP(constants, state, frozen, features._replace(keep_image=jnp.zeros(8)))
    base = dataclasses.replace(constants, adapter=None)
    alone = init_state(constants.optim, {"transformer": frozen["transformer"]})
    _, plain = STEP(base, alone, {}, features._replace(levels=None))
    assert float(off["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-6) and float(off["grad_norm"]) == 0
    assert abs(float(on["loss"]) - float(plain["loss"])) > 1e-3


def test_a_share_of_the_samples_has_random_weights_of_the_levels(setup):
    constants, frozen, state, features = setup
    random = dataclasses.replace(constants, random_granularity=0.3)
    drawn = np.asarray(_granularity(random, jnp.array(5), 4000))
    mixed = drawn.sum(axis=1) > 0
    assert mixed.mean() == pytest.approx(0.3, abs=0.03)
    np.testing.assert_allclose(drawn[mixed].sum(axis=1), 1, atol=1e-5)
    assert (np.abs(drawn[mixed].mean(axis=0) - 1 / 3) < 0.05).all()
    mid = jnp.zeros((8, 3)).at[:4, 1].set(1)
    _, metrics = STEP(constants, state, frozen, features._replace(granularity=mid))
    np.testing.assert_allclose(metrics["routing"], [1 / 6, 4 / 6, 1 / 6], atol=1e-6)  # the fresh router: all alike


def test_loss_is_the_flow_matching_error_of_the_base(setup):
    """A fresh adapter: the loss by hand, from the equation."""
    constants, frozen, state, f = setup
    _, metrics = STEP(constants, state, frozen, f)
    t, noise = np.asarray(f.t), np.asarray(f.noise)
    x = (1 - t)[:, None, None, None] * f.latents + t[:, None, None, None] * noise
    from dynaip_jax.layers.packing import image_ids, pack_latents

    velocity = constants.family.module("transformer").apply(
        {"params": frozen["transformer"]}, pack_latents(x), image_ids(8, 8), f.states, jnp.zeros((1, 6, 3)), t, f.pooled,
        jnp.ones(8),
    )  # fmt: skip
    per_sample = np.asarray((velocity - pack_latents(noise - f.latents)) ** 2).mean(axis=(1, 2))
    assert float(metrics["loss"]) == pytest.approx(per_sample.mean(), rel=1e-5)
    quarter = np.minimum((t * 4).astype(int), 3)
    for q in range(4):
        expected = per_sample[quarter == q].mean() if (quarter == q).any() else np.nan
        np.testing.assert_allclose(metrics["loss_by_time"][q], expected, rtol=1e-5)


def test_times_follow_the_shifted_logit_normal():
    t = np.asarray(flow.sample_times(jax.random.key(0), 20_000, 2.5, mean=0.2, std=0.7))
    back = np.log(t / (1 - t)) - np.log(2.5)
    assert back.mean() == pytest.approx(0.2, abs=0.02) and back.std() == pytest.approx(0.7, abs=0.02)


def test_encoders_make_what_the_step_reads(config, setup):
    """Latents are the VAE's, drawn anew each step; levels are the hidden states asked for."""
    from dynaip_jax.data.loader import make_loader

    constants, frozen, _, _ = setup
    tokenizers = Run(config).tokenizers
    data = make_loader(config.data, tokenizers, global_batch=4)
    batch = next(data)
    data.close()
    run = jax.jit(features_of, static_argnums=0)
    one, two = (run(constants, frozen, batch, jnp.int32(n)) for n in range(2))
    assert one.latents.shape == (4, 16, 8, 8) and one.states.shape == (4, 128, 32) and len(one.levels) == 3
    assert float(jnp.abs(one.latents - two.latents).max()) > 0
    np.testing.assert_array_equal(one.states, two.states)
    assert float(jnp.abs(one.noise - two.noise).max()) > 0 and float(jnp.abs(one.noise - one.latents).max()) > 0
    normal = jax.random.normal(constants.key(jnp.int32(0), 3), (4,))
    e = np.exp(0.5 + (16 - 256) * (1.15 - 0.5) / (4096 - 256))
    np.testing.assert_allclose(one.t, e / (e + 1 / jax.nn.sigmoid(normal) - 1), rtol=1e-5)


def test_flops_are_those_xla_counts_in_one_unrolled_block():
    """The formula against XLA's own count, where it counts all: one block of each kind, no scan to miscount."""
    c = FluxConfig.tiny(hidden_size=128, num_heads=2, axes_dim=(16, 24, 24), depth=1, depth_single_blocks=1)
    spec, flux = Flux.inputs_spec(c, 1, 64, 32), Flux(c, Compute(attention="xla"))
    params = jax.eval_shape(flux.init, jax.random.key(0), **spec)
    counted = jax.jit(flux.apply).lower(params, **spec).compile().cost_analysis()["flops"]
    family = tiny_family(text=dict(t5_length=32), transformer=c)
    assert family.forward_flops(64, 32) == pytest.approx(counted, rel=0.08)
    adapter = DynaIPConfig.for_base(family.sites, 32)
    frozen, free = (flops.training_step(family, adapter, 64, base_trained=b) for b in (False, True))
    assert free - frozen == family.forward_flops(64, 32)
    assert chips.chip("NVIDIA H100 80GB HBM3").flops == 989e12 and chips.chip("cpu") is None
    assert chips.chip("TPU v5 lite").flops < chips.chip("TPU v5").flops


def test_norms_are_those_of_the_parameters_and_of_what_the_step_changed(setup):
    constants, frozen, state, features = setup
    constants = dataclasses.replace(constants, optim=dataclasses.replace(constants.optim, warmup=0))
    after, values = STEP(constants, state, frozen, features)
    change = jax.tree.map(lambda new, old: new - old, after.params, state.params)
    for name, tree in dict(param_norm=after.params, update_norm=change).items():
        expected = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree)))
        assert float(values[name]) == pytest.approx(expected, rel=1e-5) and expected > 0
