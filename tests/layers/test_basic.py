"""Layers that all models share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

from dynaip_jax.families.registry import FAMILIES, family_of, open_bundle
from dynaip_jax.layers import basic
from dynaip_jax.layers.basic import Conv, DenseGeneral, Embed, GroupNorm, linear, parameter
from dynaip_jax.layers.compute import Compute


class Table(nn.Module):
    table_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x):
        return x + parameter(self, "table", self.table_init, ("embed",), x.shape[-1:], jnp.float32)


LAYERS = {
    "table": (lambda init: Table(init), "table"),
    "dense": (lambda init: DenseGeneral((2, 3), kernel_init=init), "kernel"),
    "conv": (lambda init: Conv(8, (3, 3), kernel_init=init), "kernel"),
    "norm": (lambda init: GroupNorm(2, scale_init=lambda *args: init(*args)), "scale"),
    "embed": (lambda init: Embed(7, 8, embedding_init=init), "embedding"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_given_parameter_is_taken_by_its_shape_alone(name):
    """No initializer is run for it; one of another shape, or none, is Flax's error as ever."""
    make, leaf = LAYERS[name]
    inits = 0

    def init(key, shape, dtype=jnp.float32):
        nonlocal inits
        inits += 1
        return jax.random.normal(key, shape, dtype)

    layer, x = make(init), jnp.ones((3, 4), int) if name == "embed" else jnp.ones((1, 4, 4, 8))
    given = layer.init(jax.random.key(0), x)
    made = inits
    assert made
    layer.apply(given, x)
    assert inits == made
    other = given["params"] | {leaf: jnp.ones((1,))}
    with pytest.raises(ScopeParamShapeError):
        layer.apply({"params": other}, x)
    with pytest.raises(ScopeParamNotFoundError):
        layer.apply({"params": {"another": jnp.ones(1)}}, x)


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_are_those_of_fresh_parameters(name, tiny, tiny2):
    family = family_of(open_bundle(tiny[0] if name == "flux" else tiny2[0]), Compute(), reference=True)
    for part, _ in family.configs:
        drawn = jax.eval_shape(lambda part=part: family.init_params(part, jax.random.key(0), boxed=True))
        assert family.abstract_params(part, boxed=True) == drawn, part


def test_nothing_is_drawn_where_shapes_are_asked_for():
    draws = []
    layer = Table(basic._drawn(lambda key, shape, dtype: draws.append(shape) or jnp.ones(shape, dtype)))
    init = lambda: layer.init(jax.random.key(0), jnp.ones((2, 8)))
    shapes = basic.shapes_of(init)
    assert draws == []
    assert jax.tree.map(lambda x: (x.shape, x.dtype), init()) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert draws == [(8,)]


def test_bfloat16_products_on_a_cpu_are_float32_until_rounded():
    """Otherwise XLA takes its slow path: 2.3 times the time of a forward."""
    layer = linear(8, ("embed", "mlp"), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (4, 512), jnp.bfloat16)
    params = nn.meta.unbox(layer.init(jax.random.key(1), x))
    assert "-> tensor<4x8xf32>" in jax.jit(layer.apply).lower(params, x).as_text()
    exact = np.asarray(x, np.float64) @ np.asarray(params["params"]["kernel"], np.float64)
    result = layer.apply(params, x)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(result, np.float64), exact, rtol=2**-8, atol=1e-3)
