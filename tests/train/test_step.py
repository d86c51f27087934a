"""The training step: it learns, what is frozen stays, accumulation and drops change only what they should."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynaip_jax import flow
from dynaip_jax.adapters.dynaip import DynaIPConfig
from dynaip_jax.families.registry import FAMILIES
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.flux import Flux, FluxConfig
from dynaip_jax.planner import chips, flops
from dynaip_jax.runtime.sharding import MeshConfig, make_mesh
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.testing import tiny_family
from tests.train.runs import tiny_recipe
from train import assemble as models
from train.config import OptimConfig
from train.export import export
from train.loop import train
from train.photographs import prepare_photographs
from train.step import Features, _granularity, _matrices, features_of, init_state, optimizer, train_step

STEP = jax.jit(train_step, static_argnums=0)


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """The debug recipe on the tiny bundle, with the photographs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        photographs = prepare_photographs()
    recipe = tiny_recipe(tiny)
    data = dataclasses.replace(recipe.data, path=str(photographs), workers=0)
    return dataclasses.replace(recipe, data=data, log_every=1)


def fixed(config, **changes):
    return dataclasses.replace(config, fixed_batch=True, fixed_noise=True, **changes)


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def setup(config):
    """(recipe, frozen weights, state, features of 8 samples) for the adapter."""
    mesh = make_mesh(MeshConfig())
    loaded = models.load(config, models.open_bundle(config), mesh)
    keys = iter(jax.random.split(jax.random.key(0), 9))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    levels = tuple(normal(8, 1, 17, 32) for _ in range(3))
    times = jnp.linspace(0.05, 0.95, 8)
    latents, noise = normal(8, 16, 8, 8), normal(8, 16, 8, 8)
    features = Features(latents, noise, times, normal(8, 6, 32), normal(8, 32), levels, jnp.ones(8))
    return loaded.recipe, loaded.frozen, models.fresh_state(config, loaded), features


def test_a_base_trained_from_scratch_learns_one_batch(config, tmp_path):
    """At least by half within 300 steps; seen: to 0.2 % of the first loss."""
    train(fixed(config, trainable="all", fresh_base=True, steps=150, save_every=150), tmp_path / "run")
    values = losses(tmp_path / "run")
    assert values[-1] < 0.5 * values[0]


@pytest.fixture(scope="module")
def adapter_run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "adapter"
    state = train(fixed(config, steps=120, save_every=60), workdir)
    return workdir, state


def test_an_adapter_learns_on_a_frozen_base(adapter_run):
    """Seen: below 0.7 of the first loss after 120 steps (random base, one batch)."""
    values = losses(adapter_run[0])
    assert len(values) == 120 and values[-1] < 0.85 * values[0]


def test_a_fixed_batch_alone_leaves_noise_and_times_free(config, tmp_path):
    train(dataclasses.replace(config, fixed_batch=True, steps=4, save_every=4), tmp_path / "run")
    values = losses(tmp_path / "run")
    assert max(values) / min(values) > 1.01  # a frozen base and a fresh adapter: other times, other losses


def test_frozen_means_frozen(config, adapter_run, tiny):
    _, state = adapter_run
    assert set(state.params) == set(state.ema) == {"adapter"}
    base = Bundle.open(tiny[0], FAMILIES)
    again = models.load(config, base, make_mesh(MeshConfig()))
    sizes = {leaf.size for leaf in jax.tree.leaves(again.frozen["transformer"])}
    adapter = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments < 2 * adapter + 10 and sizes  # two moments of the adapter and counters: nothing of the base


def test_the_frozen_arrays_are_the_same_after_steps(setup):
    recipe, frozen, state, features = setup
    before = jax.tree.map(lambda x: np.array(x), frozen)
    for _ in range(3):
        state, _ = STEP(recipe, state, frozen, features)
    jax.tree.map(np.testing.assert_array_equal, before, frozen)


def test_the_exported_adapter_is_the_average_and_draws(adapter_run, tiny, tmp_path, dynaip, photograph):
    workdir, state = adapter_run
    for weights in ("ema", "params"):
        export(workdir, tmp_path / weights, None, "last", weights)
        pipe = DynaIPPipeline.load(tiny[0], tmp_path / weights)
        jax.tree.map(np.testing.assert_array_equal, pipe.adapter[1], getattr(state, weights)["adapter"])
    assert json.loads((tmp_path / "ema/adapter.json").read_text())["training_step"] == 120
    status, _, stderr = dynaip(
        "sample", "--model", tiny[0], "--adapter", tmp_path / "ema", "--prompt", "x", "--reference", photograph,
        "--steps", 1, "--height", 32, "--width", 32, "--output", tmp_path / "o.png",
    )  # fmt: skip
    assert status == 0, stderr


def test_a_trained_base_is_exported_as_a_bundle_with_its_adapter(config, tmp_path):
    state = train(fixed(config, trainable="all", steps=2, save_every=2), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "adapter", tmp_path / "bundle", "best", "params")
    pipe = DynaIPPipeline.load(tmp_path / "bundle", tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, pipe.params["transformer"], state.params["transformer"])
    assert pipe.bundle.fingerprint != Bundle.open(config.bundle, FAMILIES).fingerprint


def test_a_fresh_base_starts_with_closed_gates(config):
    """adaLN-Zero: the velocity is 0 whatever goes in, and a loss of about 2 (noise and latents of unit size) is the first one."""
    fresh = dataclasses.replace(config, trainable="base", fresh_base=True)
    recipe = models.make_recipe(fresh, models.open_bundle(fresh))
    params = models.fresh_params(fresh, recipe)["transformer"]
    flux = recipe.config("transformer")
    keys = iter(jax.random.split(jax.random.key(0), 9))
    inputs = {k: jax.random.normal(next(keys), v.shape) for k, v in Flux.inputs_spec(flux).items()}
    assert (Flux(flux).apply({"params": params}, **inputs) == 0).all()


def test_muon_takes_the_matrices_and_goes_on_after_a_restart(config, tmp_path):
    muon = dataclasses.replace(config.optim, kind="muon", muon_rate=0.01)
    run = fixed(config, trainable="all", fresh_base=True, optim=muon, save_every=10)
    recipe = models.make_recipe(run, models.open_bundle(run))
    moved = jax.tree_util.tree_leaves_with_path(
        _matrices(models.fresh_params(run, recipe)), is_leaf=lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers)
    )
    names = [jax.tree_util.keystr(path) for path, _ in moved]
    assert (
        len(names) == 25 and sum("expert" in name for name in names) == 6 and not any("bias" in name for name in names)
    )
    straight = train(dataclasses.replace(run, steps=20), tmp_path / "straight")
    train(dataclasses.replace(run, steps=10), tmp_path / "cut")
    again = train(dataclasses.replace(run, steps=20), tmp_path / "cut", resume=True)
    jax.tree.map(np.testing.assert_array_equal, again.params, straight.params)
    values = losses(tmp_path / "straight")
    assert values[-1] < 0.8 * values[0]


def test_weights_can_be_exported_in_bfloat16(adapter_run, tiny, tmp_path):
    export(adapter_run[0], tmp_path / "half", None, dtype="bfloat16")
    size = (tmp_path / "half" / "adapter.safetensors").stat().st_size
    export(adapter_run[0], tmp_path / "whole", None)
    assert size < 0.6 * (tmp_path / "whole" / "adapter.safetensors").stat().st_size
    half, whole = (DynaIPPipeline.load(tiny[0], tmp_path / name).adapter[1] for name in ("half", "whole"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-8), half, whole)


def test_accumulating_4_times_b_is_4b(setup):
    recipe, frozen, state, features = setup
    whole, values = STEP(recipe, state, frozen, features)
    parts, same = STEP(dataclasses.replace(recipe, accumulate=4), state, frozen, features)
    assert float(values["loss"]) == pytest.approx(float(same["loss"]), rel=1e-6)
    assert float(values["grad_norm"]) == pytest.approx(float(same["grad_norm"]), rel=1e-5)
    moments = [optax.tree_utils.tree_get(s.opt_state, "mu") for s in (whole, parts)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), *moments)


def test_a_dropped_image_prompt_is_exactly_the_base(setup):
    """With every image prompt dropped, the loss does not depend on the adapter and its gradient is zero."""
    recipe, frozen, state, features = setup
    state = state._replace(params=jax.tree.map(lambda x: x + 0.3, state.params))
    _, on = STEP(recipe, state, frozen, features)
    _, off = STEP(recipe, state, frozen, features._replace(keep_image=jnp.zeros(8)))
    base = dataclasses.replace(recipe, adapter=None)
    alone = init_state(recipe.optim, {"transformer": frozen["transformer"]})
    _, plain = STEP(base, alone, {}, features._replace(levels=None))
    assert float(off["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-6) and float(off["grad_norm"]) == 0
    assert abs(float(on["loss"]) - float(plain["loss"])) > 1e-3


def test_a_share_of_the_samples_has_random_weights_of_the_levels(setup):
    recipe, frozen, state, features = setup
    some = dataclasses.replace(recipe, random_granularity=0.3)
    drawn = np.asarray(_granularity(some, jnp.array(5), 4000))
    mixed = drawn.sum(axis=1) > 0
    assert mixed.mean() == pytest.approx(0.3, abs=0.03)
    np.testing.assert_allclose(drawn[mixed].sum(axis=1), 1, atol=1e-5)
    assert (np.abs(drawn[mixed].mean(axis=0) - 1 / 3) < 0.05).all()
    mid = jnp.zeros((8, 3)).at[:4, 1].set(1)
    _, metrics = STEP(recipe, state, frozen, features._replace(granularity=mid))
    np.testing.assert_allclose(metrics["routing"], [1 / 6, 4 / 6, 1 / 6], atol=1e-6)  # the fresh router: all alike


def test_loss_is_the_flow_matching_error_of_the_base(setup):
    """A fresh adapter: the loss by hand, from the equation."""
    recipe, frozen, state, f = setup
    _, metrics = STEP(recipe, state, frozen, f)
    t, noise = np.asarray(f.t), np.asarray(f.noise)
    x = (1 - t)[:, None, None, None] * f.latents + t[:, None, None, None] * noise
    from dynaip_jax.layers.attention import image_ids, pack_latents

    velocity = Flux(recipe.config("transformer")).apply(
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


def test_warmup_clipping_and_decay_of_matrices_only():
    c = OptimConfig(rate=1.0, warmup=4, decay_steps=8, final=0.1, clip=1.0, weight_decay=0.5)
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    tx = optimizer(c)
    state = tx.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    rates = []
    for _ in range(9):
        updates, state = tx.update(zero, state, params)
        assert float(jnp.abs(updates["scale"]).max()) == 0
        rates.append(float(-updates["kernel"][0, 0] / 0.5))
    np.testing.assert_allclose(rates[:5], [0, 0.25, 0.5, 0.75, 1.0], atol=1e-6)
    assert rates[-1] == pytest.approx(0.1, abs=1e-6)
    big = jax.tree.map(lambda x: 100 * jnp.ones_like(x), params)
    _, clipped = tx.update(big, tx.init(params), params)
    mu = optax.tree_utils.tree_get(clipped, "mu")
    assert float(optax.global_norm(mu)) == pytest.approx(0.1, rel=1e-5)  # (1 - b1) x 1


def test_average_warms_up(setup):
    recipe, frozen, state, features = setup
    after, _ = STEP(recipe, state, frozen, features)
    expected = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, state.ema, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.ema, expected)


def test_encoders_make_what_the_step_reads(config, setup):
    """Latents are the VAE's, drawn anew each step; levels are the hidden states asked for."""
    from dynaip_jax.data.loader import make_loader

    recipe, frozen, _, _ = setup
    tokenizers = models.load(config, models.open_bundle(config), make_mesh(MeshConfig())).tokenizers
    data = make_loader(config.data, tokenizers, global_batch=4)
    batch = next(data)
    data.close()
    run = jax.jit(features_of, static_argnums=0)
    one, two = (run(recipe, frozen, batch, jnp.int32(n)) for n in range(2))
    assert one.latents.shape == (4, 16, 8, 8) and one.states.shape == (4, 128, 32) and len(one.levels) == 3
    assert float(jnp.abs(one.latents - two.latents).max()) > 0
    np.testing.assert_array_equal(one.states, two.states)
    assert float(jnp.abs(one.noise - two.noise).max()) > 0 and float(jnp.abs(one.noise - one.latents).max()) > 0
    normal = jax.random.normal(recipe.key(jnp.int32(0), 3), (4,))
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
