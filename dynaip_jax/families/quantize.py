"""8-bit weights in the transformer's blocks, by qwix: a scale for each output channel, products in the model's own dtype."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from dynaip_jax.errors import UserError
from dynaip_jax.models.flux import Flux, FluxConfig
from dynaip_jax.runtime.sharding import to_device

BLOCKS = ("double_blocks", "single_blocks")
DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


def model(config: FluxConfig) -> Any:
    """The transformer of a config, which reads parameters in the form of `config.weights`."""
    if config.weights == "full":
        return Flux(config)
    qwix = _qwix()
    rule = qwix.QuantizationRule(module_path=f"({'|'.join(BLOCKS)}).*", weight_qtype=DTYPES[config.weights])
    return qwix.quantize_model(Flux(config), qwix.PtqProvider([rule]))


def quantized(config: FluxConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of `Flux(config)` in the form of `config.weights`, on the devices. Those of blocks leave `params`, and if they are
    in the host's memory, come to the devices one by one. Raises `UserError` if qwix is not installed."""

    def one(leaf: jax.Array, function: Any) -> Any:
        shardings = jax.tree.map(lambda x: x.sharding, _rounded(leaf, function))
        return jax.jit(function, out_shardings=shardings)(to_device(leaf))

    return _each_of_blocks(config, params, one) | {k: to_device(v) for k, v in params.items()}


def abstract_quantized(config: FluxConfig, params: dict[str, Any]) -> dict[str, Any]:
    """What `quantized` makes of an abstract tree whose leaves have shardings."""
    params = dict(params)
    return _each_of_blocks(config, params, _rounded) | params


def _each_of_blocks(config: FluxConfig, params: dict[str, Any], apply: Any) -> dict[str, Any]:
    """The blocks of `params`, taken out of it, after `apply(leaf, what rounds it)`; nothing if all weights stay full."""
    if config.weights == "full":
        return {}
    quantize = _qwix().quantize_params
    inputs = {k: jnp.zeros(x.shape, x.dtype) for k, x in Flux.inputs_spec(config).items()}
    forms = nn.meta.unbox(jax.eval_shape(lambda: model(config).init(jax.random.key(0), **inputs)["params"]))
    found = {}
    for kind in BLOCKS:
        form = flatten_dict(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), forms[kind]))
        leaves, done = flatten_dict(params.pop(kind)), {}
        for path in list(leaves):
            own = {"x": form[path]}
            done[path] = apply(leaves.pop(path), jax.vmap(lambda leaf, own=own: quantize({"x": leaf}, own)["x"]))
        found[kind] = unflatten_dict(done)
    return found


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
        raise UserError("--weights: 8-bit weights need qwix, which is not here; pip install qwix") from e
    return qwix
