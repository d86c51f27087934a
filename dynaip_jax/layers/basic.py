"""What the models share: parameters with logical axis names, and block stacking.

Logical axis names (mapped to mesh axes by `dynaip_jax.runtime.sharding`): "embed" model width, "heads", "head_dim", "mlp",
"vocab", "conv_in", "conv_out", "channels" (a width that is never split), "layers" (scanned blocks), None = no width: places,
rows of a table, like parts side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from dynaip_jax.layers.compute import REMAT_POLICIES
from dynaip_jax.runtime.sharding import platform

_shapes_only: ContextVar[bool] = ContextVar("shapes_only", default=False)
SEEN = "intermediates"  # the collection in which blocks keep what they saw (Flax leaves it out of `init`); usually nothing is kept


def shapes_of(init: Callable[[], Any]) -> Any:
    """The tree of shapes and dtypes that `init()` makes, nothing allocated. Nothing is drawn at random either, the tracing of which takes
    a third of that of a network."""
    before = _shapes_only.set(True)
    try:
        return jax.eval_shape(init)
    finally:
        _shapes_only.reset(before)


def _drawn(init: Initializer) -> Initializer:
    return lambda key, shape, *rest: (nn.initializers.zeros if _shapes_only.get() else init)(key, shape, *rest)


LECUN, SMALL = _drawn(nn.initializers.lecun_normal()), _drawn(nn.initializers.normal(0.02))


def parameter(
    module: nn.Module,
    name: str,
    init: Initializer,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    dtype: DTypeLike,
) -> jax.Array:
    """A parameter of `module` with logical `axes`."""
    given: Any = _given(module, name, shape)
    if given is None:
        given = module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)
    return given


def _given(module: nn.Module, name: str, shape: Sequence[int]) -> jax.Array | None:
    """A parameter that has its value already; None if it has none of this `shape`. Flax itself would trace the initializer to compare
    shapes, in each call: half of the time that tracing a model takes."""
    value = nn.meta.unbox(module.get_variable("params", name))
    return value if value is not None and jnp.shape(value) == tuple(shape) else None


class _Given(nn.Module):
    """Takes its parameters as `parameter` does."""

    @nn.nowrap
    def param(self, name: str, init_fn: Any, *args: Any, **options: Any) -> Any:
        given = None if options else _given(self, name, args[0])
        return super().param(name, init_fn, *args, **options) if given is None else given


def _product(x: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None, **options: Any) -> jax.Array:
    """`jax.lax.dot_general`, on a CPU rounded by a step of its own: XLA has fast code there for products of bfloat16 that give float32."""
    if platform() == "cpu":
        options = dict(preferred_element_type=jnp.float32)
    return jax.lax.dot_general(x, kernel, dimensions, precision, **options).astype(x.dtype)


class DenseGeneral(_Given, nn.DenseGeneral):
    """Flax's."""

    dot_general: Any = _product


class Conv(_Given, nn.Conv):
    """Flax's."""


class GroupNorm(_Given, nn.GroupNorm):
    """Flax's."""


class Embed(_Given, nn.Embed):
    """Flax's."""


def linear(
    features: int | Sequence[int],
    axes: tuple[str | None, ...],
    *,
    name: str | None = None,
    use_bias: bool = True,
    axis: int | Sequence[int] = -1,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    kernel_init: Initializer = LECUN,
) -> DenseGeneral:
    """A `DenseGeneral` whose kernel carries the logical `axes` (input axes, then output axes); the bias the last ones."""
    outputs = 1 if isinstance(features, int) else len(features)
    return DenseGeneral(
        features=features if isinstance(features, int) else tuple(features),
        axis=axis if isinstance(axis, int) else tuple(axis),
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[-outputs:]),
        name=name,
    )


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, statistics in float32; `axis_name` names the scale's logical axis."""

    eps: float = 1e-6
    axis_name: str | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        scale = parameter(self, "scale", nn.initializers.ones, (self.axis_name,), (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, statistics in float32, with scale and bias (`affine=False`: without)."""

    eps: float = 1e-6
    affine: bool = True
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        if self.affine:
            shape, axes = (x.shape[-1],), ("embed",)
            scale = parameter(self, "scale", nn.initializers.ones, axes, shape, self.param_dtype)
            bias = parameter(self, "bias", nn.initializers.zeros, axes, shape, self.param_dtype)
            y = y * scale.astype(jnp.float32) + bias.astype(jnp.float32)
        return y.astype(x.dtype)


def embedding(num: int, features: int, *, name: str, dtype: DTypeLike, param_dtype: DTypeLike) -> Embed:
    """A lookup table `[num, features]` with logical axes ("vocab", "embed")."""
    init = nn.with_logical_partitioning(SMALL, ("vocab", "embed"))
    return Embed(num, features, dtype=dtype, param_dtype=param_dtype, embedding_init=init, name=name)


def scanned(block: type[nn.Module], length: int, *, remat: str, in_axes: tuple = (), out_axes: Any = 0):
    """`block` stacked `length` times with `nn.scan`: `__call__(carry, *inputs) -> (carry, out)`.

    Parameters get a leading "layers" axis. `in_axes` has `nn.broadcast` for inputs shared by all blocks and 0 for those
    sliced block by block. `remat` is a key of `REMAT_POLICIES`. What the blocks keep in `SEEN` is stacked as well.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat {remat!r}: expected one of {tuple(REMAT_POLICIES)}")
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0, SEEN: 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        out_axes=out_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
