"""The components a bundle may hold, by the names they have on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynaip_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from dynaip_jax.models.flux import Flux, FluxConfig
from dynaip_jax.models.t5 import T5Config, T5Encoder
from dynaip_jax.models.vae import VAE, VAEConfig

FAMILIES = ("flux",)
COMPUTE_FIELDS = ("dtype", "param_dtype", "remat", "attention")  # how, not what: not stored with the weights


class Component(NamedTuple):
    """A model class, its config class, and the inputs that `init` needs (for shapes only)."""

    config: type
    module: Callable[[Any], nn.Module]
    inputs: Callable[[Any], dict[str, jax.ShapeDtypeStruct]]


def _ids(length: int) -> dict[str, jax.ShapeDtypeStruct]:
    return dict(input_ids=jax.ShapeDtypeStruct((1, length), jnp.int32))


COMPONENTS = {
    "transformer": Component(FluxConfig, Flux, Flux.inputs_spec),
    "vae": Component(
        VAEConfig, VAE, lambda c: dict(images=jax.ShapeDtypeStruct((1, c.downsample, c.downsample, c.in_channels), jnp.float32))
    ),
    "t5": Component(T5Config, T5Encoder, lambda c: _ids(8)),
    "clip_text": Component(CLIPTextConfig, CLIPText, lambda c: _ids(c.max_position_embeddings)),
    "clip_vision": Component(
        CLIPVisionConfig,
        CLIPVision,
        lambda c: dict(
            pixel_values=jax.ShapeDtypeStruct((1, c.image_size, c.image_size, 3), jnp.float32), layers=(c.num_hidden_layers,)
        ),
    ),
}


def config_to_dict(config: Any) -> dict[str, Any]:
    """The architecture's fields of a config, as stored with weights."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in COMPUTE_FIELDS}


def abstract_params(name: str, config: Any) -> dict[str, Any]:
    """The nested tree of shapes and dtypes of a component's parameters, nothing allocated."""
    component = COMPONENTS[name]
    return nn.meta.unbox(jax.eval_shape(lambda: init_params(name, config, jax.random.key(0))))


def init_params(name: str, config: Any, key: jax.Array) -> dict[str, Any]:
    """Freshly initialised parameters of a component."""
    component = COMPONENTS[name]
    inputs = {
        k: jnp.zeros(v.shape, v.dtype) if isinstance(v, jax.ShapeDtypeStruct) else v for k, v in component.inputs(config).items()
    }
    return nn.meta.unbox(component.module(config).init(key, **inputs))["params"]
