"""The optimizer: what it moves, and how far."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynaip_jax.adapters.dynaip import DynaIPConfig, abstract_adapter_params
from dynaip_jax.families.base import Matrices
from dynaip_jax.families.registry import FAMILIES
from dynaip_jax.runtime.sharding import matrices
from dynaip_jax.testing import tiny_family
from tests.train.runs import fixed, losses
from train.config import OptimConfig
from train.loop import train
from train.optim import dimension_numbers, dotted, learning_rates, optimizer
from train.run import Run
from train.state import fresh_params, init_state, updated


def test_muon_takes_the_matrices_and_goes_on_after_a_restart(config, tmp_path):
    muon = dataclasses.replace(config.optim, kind="muon", muon_rate=0.01)
    run = fixed(config, trainable="all", fresh_base=True, optim=muon, save_every=10)
    constants = Run(run).constants
    moved = jax.tree_util.tree_leaves_with_path(
        dimension_numbers(fresh_params(run, constants), constants.matrices),
        is_leaf=lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers),
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


def test_warmup_clipping_and_decay_of_matrices_only():
    c = OptimConfig(rate=1.0, warmup=4, decay_steps=8, final=0.1, clip=1.0, weight_decay=0.5)
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    tx = optimizer(c, {"kernel"})
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
    assert float(optax.tree.norm(mu)) == pytest.approx(0.1, rel=1e-5)  # (1 - b1) x 1


MATRICES = {"kernel", "embedding", "key", "value"}  # last parts of names; the last two are an adapter's banks
VECTORS = {
    "bias", "scale", "mean", "variance", "key_norm", "queries", "position_embedding", "class_embedding", "relative_attention_bias",
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_matrices_are_told_by_their_axes_in_every_network(name):
    """Stacked scales and biases have two axes and more, and are none."""
    family = tiny_family(name)
    hmoe = dict(levels=(1, 2, 3), expert_width=8, resampler_tokens=4, resampler_heads=2)
    width = family.config("clip_vision").hidden_size
    adapters = [DynaIPConfig.for_base(family.sites, width, hmoe=hmoe, blocks=b) for b in ("double", "all")]
    trees = {n: family.abstract_params(n, boxed=True) for n in family.components}
    trees |= {a.blocks: abstract_adapter_params(a, boxed=True) for a in adapters}
    names, stacked = set(), 0
    for tree in trees.values():
        found = matrices(tree)
        for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(tree)):
            last = dotted(path).rpartition(".")[2]
            assert (dotted(path) in found) == (last in MATRICES), dotted(path)
            names.add(last)
            stacked += last in VECTORS and leaf.ndim > 1
    assert names <= MATRICES | VECTORS and MATRICES <= names and stacked > 20


def test_decay_leaves_stacked_scales_and_biases_alone(config):
    """With no gradient, decay alone moves parameters: the base's and the adapter's matrices, and nothing else."""
    everything = dataclasses.replace(config, trainable="all")
    constants = Run(everything).constants
    optim = dataclasses.replace(config.optim, weight_decay=10.0, warmup=0)
    shapes = jax.eval_shape(lambda: fresh_params(everything, constants))
    ones = init_state(optim, jax.tree.map(lambda x: jnp.ones(()), shapes))  # it goes by names, not by sizes
    zero = jax.tree.map(jnp.zeros_like, ones.params)
    moved = jax.jit(lambda: updated(optim, ones, zero, constants.decayed).params)()
    shrunk = {
        dotted(path) for path, x in jax.tree_util.tree_leaves_with_path(moved) if not np.array_equal(x, np.ones_like(x))
    }
    assert shrunk == constants.decayed and "adapter.double.key_norm" not in shrunk
    assert any(".qkv.kernel" in name for name in shrunk)
    assert all(name.rpartition(".")[2] in MATRICES for name in shrunk)


def test_learning_rates_are_those_of_the_step():
    """Of step n, the optimizer's n-th update; seen in how far weight decay alone moves a parameter."""
    c = OptimConfig(kind="muon", rate=1.0, muon_rate=0.5, warmup=4, decay_steps=8, final=0.1, weight_decay=0.5)
    rates = [learning_rates(c, step) for step in range(1, 10)]
    params = {"bias": jnp.ones((2, 2)), "blocks": {"kernel": jnp.ones((1, 2, 2))}}
    kernels = (Matrices("kernel", (1,), (2,)),)
    tx, zero = optimizer(c, {"bias", "blocks.kernel"}, kernels), jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params)
    for step in range(9):
        updates, state = tx.update(zero, state, params)
        assert float(-updates["bias"][0, 0] / 0.5) == pytest.approx(rates[step]["learning_rate"], abs=1e-6)
        assert float(-updates["blocks"]["kernel"][0, 0, 0] / 0.5) == pytest.approx(
            rates[step]["muon_learning_rate"], abs=1e-6
        )
    assert set(learning_rates(OptimConfig(), 1)) == {"learning_rate"}
