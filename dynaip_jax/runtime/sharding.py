"""Where arrays live: the mesh, and one table from logical axis names to mesh axes, of parameters and of activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dynaip_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
# Mesh axes that the batch is split over, the outer first. The order matters: with ("data", "fsdp"), XLA's partitioner
# (jax 0.10.2, CPU) swaps samples between devices on a mesh whose three axes are all above 1; tests/train/test_devices.py.
BATCH = ("fsdp", "data")

RULES: Mapping[str | None, tuple[str, ...]] = {  # logical axis -> mesh axes; a name that is not here is an error
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "conv_out": ("fsdp", "tensor"),
    "conv_in": (),
    "channels": (),
    "head_dim": (),
    "layers": (),
    "batch": BATCH,  # this and "heads", "mlp": of activations too
    "height": AXES,  # of pictures: what the batch leaves of the mesh
    None: (),
}

WIDTHS = frozenset(
    ("embed", "heads", "mlp", "vocab", "conv_out", "conv_in", "head_dim", "channels")
)  # of vectors; others count them

# logical axes of activations
ROWS = ("batch", None, None)  # [b, n, c]
WIDE = ("batch", None, "mlp")  # [b, n, width of an MLP]
HEADS = ("batch", None, "heads", None)  # [b, n, h, d]
PICTURES = ("batch", "height", None, None)  # [b, h, w, c]


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 for at most one of them means all that are left."""

    data: int = -1  # copies of everything, each with its part of the batch
    fsdp: int = 1  # parameters and optimizer state split; batch split too
    tensor: int = 1  # heads and MLP width split


def parse_mesh(text: str) -> MeshConfig:
    """ "data=2,fsdp=4" -> its `MeshConfig`; axes that are not named have size 1. Raises `UserError` for anything else."""
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or not size.removeprefix("-").isdigit():
            raise UserError(
                f"--mesh {text}: {part.strip()!r}; expected such as data=2,fsdp=4,tensor=1 (-1: all that are left)"
            )
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """A mesh over all devices of all processes (or over `devices`). On several TPU slices `data` goes over the slow network between
    them, and what is exchanged at every layer stays within each.

    Raises `UserError` if the sizes do not multiply to the number of devices, or `data` does not divide into the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    given = math.prod(s for s in sizes if s != -1)
    asked = f"mesh data x fsdp x tensor = {config.data} x {config.fsdp} x {config.tensor}"
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise UserError(f"{asked}: expected positive numbers and at most one -1; correct --mesh.data, .fsdp or .tensor")
    if -1 in sizes and len(devices) % given == 0:
        sizes[sizes.index(-1)] = len(devices) // given
    if math.prod(sizes) != len(devices):
        raise UserError(f"{asked}: does not fit {len(devices)} devices; choose sizes whose product is {len(devices)}")
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices > 1:
        return _across(slices, sizes, devices, asked)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=tuple(devices))


def _across(slices: int, sizes: list[int], devices: Any, asked: str) -> Mesh:
    """A mesh whose first axis is split over `slices` of TPUs before it is split within them."""
    from jax.experimental import mesh_utils

    data, *within = sizes
    if data % slices:
        raise UserError(
            f"{asked}: {slices} slices of {len(devices) // slices} devices, of which each needs whole copies; choose a --mesh.data that is "
            f"a multiple of {slices}, and --mesh.fsdp and .tensor that fit into one slice"
        )
    grid = mesh_utils.create_hybrid_device_mesh((data // slices, *within), (slices, 1, 1), devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of an array by its logical axis `names`. An axis is split over as many of its mesh axes as divide it, and
    no mesh axis is used twice. Raises `KeyError` for a name without a rule."""
    used: set[str] = set()
    parts: list[tuple[str, ...] | str | None] = []
    for name, size in zip(names, shape, strict=True):
        taken: list[str] = []
        for axis in RULES[name]:
            if axis not in used and size % math.prod(mesh.shape[a] for a in (*taken, axis)) == 0:
                taken.append(axis)
        used.update(taken)
        parts.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return PartitionSpec(*parts)


def matrices(boxed: Any) -> frozenset[str]:
    """Dotted names of the parameters of a boxed tree that are matrices by their logical axes: they map one width to another, where
    "heads" and "head_dim" side by side are one. Scales, biases and tables of vectors are not, however often they are stacked."""
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    found = []
    for path, leaf in leaves:
        axes = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        widths = [
            axis
            for n, axis in enumerate(axes)
            if axis in WIDTHS and (axis, axes[n - 1 : n]) != ("head_dim", ("heads",))
        ]
        if len(widths) > 1:
            found.append(jax.tree_util.keystr(path, simple=True, separator="."))
    return frozenset(found)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` with its logical axis `names` laid out over the mesh in use (`jax.set_mesh`); as it is if there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def platform() -> str:
    """ "cpu", "gpu" or "tpu": what a program traced now is for, by the mesh in use or else by JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """The tree of shardings of an abstract tree whose leaves are boxed with logical names; plain leaves are replicated, and
    boxes that an optimizer left empty stay so."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, nn.LogicallyPartitioned):
            if not jax.tree.leaves(leaf.value):
                return leaf.value
            return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over `BATCH`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_positions(mesh: Mesh, batch: int) -> np.ndarray:
    """Positions int `[b]`, ascending, in a global batch of the samples that this process feeds.

    Each is fed by one process, but by all that have a device at its place if they share it along `tensor`.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[place] for place in places]))


def local_part(x: jax.Array) -> np.ndarray:
    """The rows of an array split by `batch_sharding` that this process has, in the order of `batch_positions`."""
    rows: dict[int, Any] = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(rows[start]) for start in sorted(rows)])


def abstract(boxed: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of a boxed abstract tree, as `jax.ShapeDtypeStruct`s: what a checkpoint restores to."""
    plain = nn.meta.unbox(boxed)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, shardings(boxed, mesh))


def on_one_device(tree: Any) -> Any:
    """Shapes and dtypes of an abstract tree, all on the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


def on_host(tree: Any) -> Any:
    """An abstract tree, in the memory of the hosts of its devices."""
    return jax.tree.map(lambda x: x.update(sharding=x.sharding.with_memory_kind("pinned_host")), tree)


def to_device(tree: Any) -> Any:
    """A tree on the devices of its shardings, where it is in the memory of their hosts."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")), tree)
