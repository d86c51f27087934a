"""Tiny transformers of all families, of the same sizes, as tests of injection see them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dynaip_jax.layers.compute import Compute
from dynaip_jax.layers.injection import Injection, joint_attention
from dynaip_jax.models import flux, flux2
from dynaip_jax.models.flux import Flux, FluxConfig
from dynaip_jax.models.flux2 import Counts, Flux2, Flux2Config
from dynaip_jax.models.mmdit import Modulation

B, S, M, T, I = 2, 2, 5, 8, 16  # noqa: E741  (the axis letters)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def mods(seed, parts):
    """Random modulations of `parts` parts of a block."""
    return [
        Modulation(*(normal(seed + 10 * n + k, B, 1, Flux2Config.tiny().hidden_size) for k in range(3)))
        for n in range(parts)
    ]


class Backbone(NamedTuple):
    """`network(config, compute, injection)`; `shared(rope, places)`: what blocks read; `block(kind, how)`: one of "double" or "single";
    `attend(how, qkv, shared, prompt, evidence)`: what it computes of T text and I image rows."""

    network: Any
    config: Any
    dev: Any
    shared: Callable[..., Any]
    block: Callable[..., Any]
    attend: Callable[..., Any]

    @property
    def axes(self):
        """Of positions."""
        return len(self.config.axes_dim)

    def inputs(self):
        """Random ones, the image rows on a grid."""
        spec = self.network.inputs_spec(self.config, B, I, T)
        values = {k: normal(i, *s.shape) for i, (k, s) in enumerate(spec.items())}
        ids = jax.numpy.stack(jax.numpy.meshgrid(*map(jax.numpy.arange, (1, 4, 4, 1)[: self.axes]), indexing="ij"), -1)
        return values | dict(
            img_ids=ids.reshape(1, I, self.axes).astype(float), txt_ids=jax.numpy.zeros((1, T, self.axes))
        )


def _flux_block(kind, how):
    if kind == "double":
        return flux.DoubleBlock(FluxConfig.tiny(), Compute(), how)
    return flux.SingleBlock(FluxConfig.tiny(), Compute(), how, T)


def _flux2_block(kind, how):
    block = dict(double=flux2.DoubleBlock, single=flux2.SingleBlock)[kind]
    return block(Flux2Config.tiny(), Compute(), how, Counts(T, I))


def _flux_shared(rope, places):
    return flux.Shared(normal(1, B, FluxConfig.tiny().hidden_size), rope, places)


def _flux2_shared(rope, places):
    return flux2.Shared(mods(40, 2), mods(60, 2), mods(80, 1), rope, places)


def _attend(how, qkv, shared, prompt, evidence, own=None):
    return joint_attention(how, "auto", qkv, shared.rope, shared.places, prompt, evidence, T, own)


BACKBONES = dict(
    flux=Backbone(
        Flux, FluxConfig.tiny(), FluxConfig.dev(), _flux_shared, _flux_block,
        _attend,
    ),
    flux2=Backbone(
        Flux2, Flux2Config.tiny(), Flux2Config.klein_4b(), _flux2_shared, _flux2_block,
        _attend,
    ),
)  # fmt: skip
PLAIN = Injection()
