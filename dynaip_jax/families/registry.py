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
# how, not what, or an adapter's choice: not stored with the weights
COMPUTE_FIELDS = (
    "dtype", "param_dtype", "remat", "attention", "weights", "reference_query", "reference_merge", "region_sharpness",
)  # fmt: skip


class Component(NamedTuple):
    """A config class and a model class; `options`: what `init` needs besides the arrays of `inputs_spec`."""

    config: Any
    module: Any
    options: Callable[[Any], dict[str, Any]] = lambda config: {}


COMPONENTS = {
    "transformer": Component(FluxConfig, Flux),
    "vae": Component(VAEConfig, VAE),
    "t5": Component(T5Config, T5Encoder),
    "clip_text": Component(CLIPTextConfig, CLIPText),
    "clip_vision": Component(CLIPVisionConfig, CLIPVision, lambda c: dict(layers=(c.num_hidden_layers,))),
}


def config_to_dict(config: Any) -> dict[str, Any]:
    """The architecture's fields of a config, as stored with weights."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in COMPUTE_FIELDS}


def init_params(name: str, config: Any, key: jax.Array, *, boxed: bool = False) -> dict[str, Any]:
    """Freshly initialised parameters of a component; `boxed` leaves each in the box that holds its logical axis names."""
    component = COMPONENTS[name]
    inputs = {k: jnp.zeros(v.shape, v.dtype) for k, v in component.module.inputs_spec(config).items()}
    params = component.module(config).init(key, **inputs, **component.options(config))["params"]
    return params if boxed else nn.meta.unbox(params)


def abstract_params(name: str, config: Any, *, boxed: bool = False) -> dict[str, Any]:
    """The nested tree of shapes and dtypes of a component's parameters, nothing allocated; `boxed`: see `init_params`."""
    return jax.eval_shape(lambda: init_params(name, config, jax.random.key(0), boxed=boxed))
