"""8-bit weights in the transformer's blocks, by qwix: a scale for each output channel, products in the model's own dtype."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynaip_jax.errors import UserError
from dynaip_jax.models.flux import Flux, FluxConfig

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
    """Parameters of `Flux(config)` in the form of `config.weights`, on the devices where they are. The blocks of a kind leave
    `params` as soon as they are done. Raises `UserError` if qwix is not installed."""
    if config.weights == "full":
        return params
    quantize = _qwix().quantize_params
    inputs = {k: jnp.zeros(x.shape, x.dtype) for k, x in Flux.inputs_spec(config).items()}
    form = nn.meta.unbox(jax.eval_shape(lambda: model(config).init(jax.random.key(0), **inputs)["params"]))
    for kind in BLOCKS:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), form[kind])
        params[kind] = jax.jit(jax.vmap(lambda block, one=one: quantize(block, one)))(params.pop(kind))
    return params


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as e:
        raise UserError("--weights: 8-bit weights need qwix, which is not here; pip install qwix") from e
    return qwix
