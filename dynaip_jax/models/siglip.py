"""SigLIP's vision tower, whose pooled state InstantX's image-prompt adapter reads.

Source: Zhai et al., arXiv 2303.15343; transformers `SiglipVisionModel`, to whose parameters ours map one to one, but that blocks are
stacked, heads have an axis of their own, and the head's queries, keys and values lie apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynaip_jax.layers.attention import attention
from dynaip_jax.layers.basic import LECUN, parameter, scanned
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.hf import config_from_hf
from dynaip_jax.models.towers import (
    ACTIVATIONS,
    TowerBlock,
    VisionTowerConfig,
    dense,
    patches,
    position_table,
    tower_norm,
    tower_part,
)


@dataclass(frozen=True, kw_only=True)
class SiglipVisionConfig(VisionTowerConfig):
    """Sizes of the tower, in transformers' field names and with its defaults. Raises `ValueError` for sizes that do not fit."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    @property
    def tokens(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def so400m(cls, **changes) -> SiglipVisionConfig:
        """so400m-patch14-384: 1152 wide, 27 blocks of 16 heads, 729 patches."""
        sizes = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
        return cls(**{**sizes, "image_size": 384, "patch_size": 14, **changes})

    @classmethod
    def tiny(cls, **changes) -> SiglipVisionConfig:
        """For tests: 36 wide, 2 blocks, 4 patches of a 20-pixel image."""
        sizes = dict(hidden_size=36, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)
        return cls(**{**sizes, "image_size": 20, "patch_size": 10, **changes})

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **changes) -> SiglipVisionConfig:
        """The config in the dictionary of a transformers SigLIP `config.json`, of the vision tower or of both.

        `changes` are fields of ours. Raises `UserError` for another kind of model or activation, for images of other than 3 channels,
        for a tower without its pooling head and for sizes that do not fit.
        """
        supported = dict(model_type=("siglip_vision_model",), num_channels=(3,), vision_use_head=(True,))
        return config_from_hf(cls, tower_part(hf, "vision_config"), supported, changes)


class SiglipHead(nn.Module):
    """The patches' states `[b, n, c]` -> pooled `[b, c]`: a learned query attends to them, then an MLP."""

    config: SiglipVisionConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, p = self.config, self.compute
        heads, axes = (c.num_attention_heads, c.head_dim), ("embed", "heads", "head_dim")
        probe = parameter(self, "probe", LECUN, (None, "embed"), (1, c.hidden_size), p.param_dtype)
        query = jnp.broadcast_to(probe.astype(p.dtype), (len(x), 1, c.hidden_size))
        q, k, v = (dense(p, heads, axes, f"{name}_proj")(rows) for name, rows in (("q", query), ("k", x), ("v", x)))
        heads_out = attention(q, k, v, kernel=p.attention)
        x = dense(p, c.hidden_size, ("heads", "head_dim", "embed"), "out_proj", axis=(-2, -1))(heads_out)
        h = dense(p, c.intermediate_size, ("embed", "mlp"), "fc1")(tower_norm(c, p, "layernorm")(x))
        return (x + dense(p, c.hidden_size, ("mlp", "embed"), "fc2")(ACTIVATIONS[c.hidden_act](h)))[:, 0]


class SiglipVision(nn.Module):
    """Images -> pooled states `[b, c]` in `compute.dtype`.

    `pixel_values` `[b, H, W, 3]`: normalised to [-1, 1], channels last, H = W = `image_size`. Raises `ValueError` for images of another
    shape.
    """

    config: SiglipVisionConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        c, p = self.config, self.compute
        c.check_pixels(pixel_values)
        rows = patches(c, p, use_bias=True)(pixel_values).reshape(len(pixel_values), c.tokens, c.hidden_size)
        x = rows + position_table(self, p, "position_embedding", c.tokens, c.hidden_size)
        x, _ = scanned(TowerBlock, c.num_hidden_layers, remat=p.remat)(c, p, name="blocks")(x)
        return SiglipHead(c, p, name="head")(tower_norm(c, p, "post_layernorm")(x))

    @staticmethod
    def inputs_spec(config: SiglipVisionConfig, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`, by name."""
        return dict(pixel_values=jax.ShapeDtypeStruct((batch, config.image_size, config.image_size, 3), jnp.float32))
