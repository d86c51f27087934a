"""Rotary positions: both ways to rotate are one, on a TPU without copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dynaip_jax.layers import positions
from dynaip_jax.layers.positions import apply_rope, rope_table
from dynaip_jax.planner import hlo, topologies
from dynaip_jax.runtime.sharding import MeshConfig, make_mesh

AXES = (16, 56, 56)


def random(shape, dtype, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def table(rows):
    return rope_table(60 * jax.random.uniform(jax.random.key(1), (2, rows, 3)), AXES, 10_000.0)


@pytest.mark.parametrize("dtype, rounding", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-6)])
def test_a_product_rotates_as_pairs_do(dtype, rounding):
    x, rope = random((2, 9, 3, 128), dtype), table(9)
    cos, sin = (r[..., None, :] for r in rope)
    by_product, by_pairs = positions._by_product(x, cos, sin), positions._by_pairs(x, cos, sin)
    assert by_product.dtype == by_pairs.dtype == dtype
    np.testing.assert_allclose(by_product.astype(jnp.float32), by_pairs.astype(jnp.float32), atol=rounding)
    np.testing.assert_array_equal(apply_rope(x, rope), by_pairs)


def test_the_gradient_is_turned_back():
    x, rope, ahead = random((2, 9, 3, 128), jnp.float32), table(9), random((2, 9, 3, 128), jnp.float32, seed=2)
    cos, sin = (r[..., None, :] for r in rope)
    (expected,) = jax.vjp(lambda x: positions._by_pairs(x, cos, sin), x)[1](ahead)
    (found,) = jax.vjp(lambda x: apply_rope(x, rope), x)[1](ahead)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_tpu_writes_the_rotated_rows_and_nothing_else():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), topologies.devices("v5e:2x2"))
    here = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((2, 4096, 24, 128), jnp.bfloat16, sharding=here)
    rope = tuple(jax.ShapeDtypeStruct((2, 4096, 64), jnp.float32, sharding=here) for _ in "cs")
    with jax.set_mesh(mesh):
        compiled = jax.jit(apply_rope).lower(x, rope).compile()
    written, tables = hlo.count(compiled.as_text()).written_bytes, 2 * 2 * 4096 * 128 * 4
    assert x.size * 2 <= written <= x.size * 2 + tables
