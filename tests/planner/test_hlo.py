"""What is read off compiled programs, against XLA's own count where there are no loops, and against the work asked for where there are."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dynaip_jax.planner import hlo, topologies
from dynaip_jax.runtime.sharding import MeshConfig, constrain, make_mesh


@pytest.fixture(scope="module")
def mesh():
    return devices("v5e:2x2", 4)


def devices(topology, count):
    return make_mesh(MeshConfig(data=1, fsdp=count), topologies.devices(topology))


def compiled(mesh, function, *arguments):
    """`function` compiled for `mesh`; each argument is a shape and the mesh axes of its axes."""
    placed = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        for shape, axes in arguments
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*placed).compile()


def layers(weights, x):
    return jax.lax.scan(lambda x, w: (constrain(jnp.tanh(x @ w), "batch", None), None), x, weights)[0]


def test_a_loop_counts_as_often_as_it_goes_round(mesh):
    program = compiled(mesh, layers, ((5, 256, 256), (None, "fsdp")), ((512, 256), ("fsdp",)))
    found = hlo.count(program.as_text())
    assert found.collectives == {"all-gather": dict(count=5, bytes=5 * 256 * 256 * 2)}
    assert found.product_flops == 5 * 2 * 128 * 256 * 256 and found.kernels == 0


def test_a_ring_counts_whole():
    """With large matrices each device multiplies by the part it has while it passes it on, in a loop of a few parts a round."""
    weights = (3, 4096, 4096)
    program = compiled(devices("v5e:4x4", 16), layers, (weights, (None, "fsdp")), ((16384, 4096), ("fsdp",)))
    found, size = hlo.count(program.as_text()), 2 * 3 * 4096 * 4096
    assert "windowed_dot_general" in program.as_text()
    assert found.product_flops == 1024 * size
    assert 15 / 16 * size <= found.collectives["collective-permute"]["bytes"] <= 1.1 * size


@pytest.mark.parametrize(
    "function, shapes",
    [
        (lambda x, w: jnp.einsum("bnhd,bmhd->bhnm", x, w), [(2, 256, 4, 128), (2, 384, 4, 128)]),
        (lambda x, w: jnp.einsum("bnc,chd->bnhd", x, w), [(2, 256, 512), (512, 4, 128)]),
        (lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", (1, 1), (1, 1), ("NHWC", "HWIO", "NHWC")),
         [(1, 64, 64, 128), (3, 3, 128, 256)]),
        (lambda x, w: jax.lax.conv_general_dilated(x, w, (2, 2), "VALID", (1, 1), (1, 1), ("NHWC", "HWIO", "NHWC")),
         [(1, 65, 65, 128), (3, 3, 128, 256)]),
    ],
    ids=["batched", "heads", "convolution", "strided"],
)  # fmt: skip
def test_products_are_what_xla_counts(mesh, function, shapes):
    program = compiled(mesh, function, *((shape, ()) for shape in shapes))
    assert 0 < hlo.count(program.as_text()).product_flops == pytest.approx(program.cost_analysis()["flops"], rel=0.01)


def test_products_of_a_program_for_the_cpu():
    program = jax.jit(layers).lower(jnp.ones((5, 64, 64)), jnp.ones((128, 64))).compile()
    assert hlo.count(program.as_text()).product_flops == 5 * 2 * 128 * 64 * 64


LARGE = (64, 1024, 1024)  # 128 MiB of bfloat16, which no vector memory takes
SIZE = 2 * 64 * 1024 * 1024


def filled(x):
    rows = lambda n, out: jax.lax.dynamic_update_index_in_dim(out, jnp.tanh(x * n.astype(x.dtype)), n, 0)
    return jax.lax.fori_loop(0, LARGE[0], rows, jnp.zeros(LARGE, x.dtype))


@pytest.mark.parametrize(
    "function, shape, written, copied",
    [
        (lambda x: jnp.tanh(x) + 1, LARGE, SIZE, 0),  # one fusion
        (lambda x: (jnp.tanh(x), x[:32] + 1), LARGE, 1.5 * SIZE, 0),  # of two results
        (lambda x: x.transpose(0, 2, 1), LARGE, SIZE, SIZE),
        (filled, LARGE[1:], SIZE, 0),  # a part a round, in place
    ],
    ids=["fused", "two results", "transposed", "in place"],
)
def test_bytes_written_to_main_memory(mesh, function, shape, written, copied):
    found = hlo.count(compiled(mesh, function, (shape, ())).as_text())
    assert found.written_bytes == pytest.approx(written, rel=1e-4)
    assert found.copied_bytes == pytest.approx(copied, rel=1e-4, abs=1e4)
