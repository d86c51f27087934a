"""Weights in the layout of their program: what it saves on a TPU, and that they are the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

from dynaip_jax.planner import topologies
from dynaip_jax.runtime import layouts
from dynaip_jax.runtime.sharding import MeshConfig, make_mesh


def attend(scale, params, x, *, steps=3):
    """Steps of layers of a product with three parts of some heads."""

    def layer(x, kernel):
        q, k, v = jnp.moveaxis(jnp.einsum("nc,cphd->nphd", x, kernel), 1, 0)
        return x + scale * (q * jnp.tanh(k) * v).reshape(x.shape), None

    return jax.lax.scan(lambda x, _: (jax.lax.scan(layer, x, params["kernel"])[0], None), x, length=steps)[0]


def test_no_copy_of_the_weights_on_a_tpu():
    mesh = make_mesh(MeshConfig(data=1), topologies.devices("v5e:1x1"))
    here = NamedSharding(mesh, PartitionSpec())
    kernel = jax.ShapeDtypeStruct((8, 3072, 3, 24, 128), jnp.bfloat16, sharding=here)
    x = jax.ShapeDtypeStruct((4608, 3072), jnp.bfloat16, sharding=here)
    with jax.set_mesh(mesh):
        usual = jax.jit(attend, static_argnums=0).lower(0.1, dict(kernel=kernel), x).compile()
        free = layouts.lower(attend, 0.1, dict(kernel=kernel), (x,), {}).compile()
    scratch = [program.memory_analysis().temp_size_in_bytes for program in (usual, free)]
    assert scratch[0] > 2 * kernel.size > scratch[1]
    assert free.input_formats[0][0]["kernel"].layout.major_to_minor != (0, 1, 2, 3, 4)


def test_weights_move_to_the_layout_and_are_the_same():
    """They are copied for the program once, and whoever holds the originals keeps them."""
    rng = np.random.default_rng(0)
    values, x = rng.normal(size=(2, 24, 3, 4, 6)).astype(np.float32), jnp.asarray(rng.normal(size=(5, 24)), jnp.float32)
    other = jax.device_put(values, Format(Layout((0, 2, 3, 1, 4)), jax.sharding.SingleDeviceSharding(jax.devices()[0])))
    weights = layouts.Arranged(dict(kernel=other))
    result = weights.run(attend, 0.1, (x,), {})
    placed = weights.params["kernel"]
    assert placed.format != other.format
    for kernel in (placed, other):
        np.testing.assert_array_equal(kernel, values)
    weights.run(attend, 0.1, (x,), {})
    assert weights.params["kernel"] is placed
    np.testing.assert_allclose(result, attend(0.1, dict(kernel=values), x), rtol=1e-6)
