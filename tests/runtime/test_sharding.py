"""Meshes over several TPU slices, whose devices are described by libtpu."""

import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.planner.topologies import devices
from dynaip_jax.runtime.sharding import MeshConfig, make_mesh

WHOLE = "2xv5e:2x2"  # two slices of four devices


@pytest.mark.parametrize(
    "config, shape",
    [
        (MeshConfig(data=2, fsdp=4), (2, 4, 1)),
        (MeshConfig(data=-1, fsdp=2), (4, 2, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (MeshConfig(), (8, 1, 1)),
    ],
)
def test_only_copies_lie_on_different_slices(config, shape):
    mesh = make_mesh(config, devices(WHOLE))
    assert mesh.devices.shape == shape and mesh.axis_names == ("data", "fsdp", "tensor")
    for number, copies in enumerate(mesh.devices):
        assert {device.slice_index for device in copies.flat} == {number * 2 // shape[0]}
    assert len({device.id for device in mesh.devices.flat}) == 8


@pytest.mark.parametrize("config", [MeshConfig(data=1, fsdp=8), MeshConfig(data=1, fsdp=2, tensor=-1)])
def test_what_is_exchanged_at_every_layer_stays_within_a_slice(config):
    with pytest.raises(
        UserError, match="2 slices of 4 devices, of which each needs whole copies; choose a --mesh.data"
    ):
        make_mesh(config, devices(WHOLE))


def test_one_slice_is_as_before():
    assert make_mesh(MeshConfig(data=1, fsdp=4), devices("v5e:2x2")).devices.shape == (1, 4, 1)
