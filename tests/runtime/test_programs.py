"""Programs for a CPU hold stacked bfloat16 weights once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from dynaip_jax.layers.basic import linear, scanned
from dynaip_jax.runtime import layouts
from dynaip_jax.runtime.programs import Quick

BLOCKS, WIDTH = 16, 512
BF16 = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(linear(WIDTH, ("embed", "mlp"), name="change", **BF16)(x)), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        return scanned(Block, BLOCKS, remat="none")(name="blocks")(x)[0]


def run(_, params, x):
    return Stack().apply({"params": params}, x)


@pytest.mark.parametrize("kind", ["quick", "arranged"])
def test_stacked_weights_are_not_held_twice(kind):
    x = jnp.ones((64, WIDTH), jnp.bfloat16)
    params = nn.meta.unbox(Stack().init(jax.random.key(0), x)["params"])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    lowered = (
        Quick(run, static_argnums=0).lower(None, params, x)
        if kind == "quick"
        else layouts.lower(run, None, params, (x,), {})
    )
    assert lowered.compile().memory_analysis().temp_size_in_bytes < size / 4
    usual = jax.jit(run, static_argnums=0).lower(None, params, x).compile()
    assert usual.memory_analysis().temp_size_in_bytes > 2 * size
