"""8-bit weights in the transformer's blocks, by qwix: a scale for each output channel, products in the model's own dtype."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from dynaip_jax.errors import UserError
from dynaip_jax.families.base import Family
from dynaip_jax.runtime.sharding import to_device

DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def weights_model(family: Family) -> Any:
    """The transformer of a family, which reads parameters in the form of its `Compute.weights`."""
    kind = family.compute("transformer").weights
    if kind == "full":
        return family.module("transformer")
    qwix = _qwix()
    rule = qwix.QuantizationRule(module_path=f"({'|'.join(family.blocks)}).*", weight_qtype=DTYPES[kind])
    return qwix.quantize_model(family.module("transformer"), qwix.PtqProvider([rule]))


def quantized(family: Family, params: dict[str, Any]) -> dict[str, Any]:
    """The transformer's parameters in the form of its `Compute.weights`, on the devices. Those of blocks leave `params`, and if they
    are in the host's memory, come to the devices one by one. Raises `UserError` if qwix is not installed."""

    def one(leaf: jax.Array, function: Any) -> Any:
        shardings = jax.tree.map(lambda x: x.sharding, _rounded(leaf, function))
        return jax.jit(function, out_shardings=shardings)(to_device(leaf))

    return _each_of_blocks(family, params, one) | {k: to_device(v) for k, v in params.items()}


def abstract_quantized(family: Family, params: dict[str, Any]) -> dict[str, Any]:
    """What `quantized` makes of an abstract tree whose leaves have shardings."""
    params = dict(params)
    return _each_of_blocks(family, params, _rounded) | params


def _each_of_blocks(family: Family, params: dict[str, Any], apply: Any) -> dict[str, Any]:
    """The blocks of `params`, taken out of it, after `apply(leaf, what rounds it)`; nothing if all weights stay full."""
    if family.compute("transformer").weights == "full":
        return {}
    quantize, module = _qwix().quantize_params, family.components["transformer"].module
    inputs = {k: jnp.zeros(x.shape, x.dtype) for k, x in module.inputs_spec(family.config("transformer")).items()}
    forms = nn.meta.unbox(jax.eval_shape(lambda: weights_model(family).init(jax.random.key(0), **inputs)["params"]))
    rounded = {}
    for kind in family.blocks:
        form = flatten_dict(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), forms[kind]))
        leaves, done = flatten_dict(params.pop(kind)), {}
        for path in list(leaves):
            own = {"x": form[path]}
            done[path] = apply(leaves.pop(path), jax.vmap(lambda leaf, own=own: quantize({"x": leaf}, own)["x"]))
        rounded[kind] = unflatten_dict(done)
    return rounded


def _rounded(leaf: Any, function: Any) -> Any:
    """Shapes, dtypes and shardings of `function(leaf)`: axes that are as long as before stay split as they are."""

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        where = leaf.sharding.with_memory_kind("device")
        if isinstance(where, NamedSharding):
            parts = (*where.spec, *[None] * (len(leaf.shape) - len(where.spec)))
            kept = (p if n == m else None for p, n, m in zip(parts, x.shape, leaf.shape, strict=True))
            where = NamedSharding(where.mesh, PartitionSpec(*kept))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(placed, jax.eval_shape(function, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)))


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as e:
        raise UserError("`weights`: 8-bit weights need qwix, which is not here; pip install qwix") from e
    return qwix
