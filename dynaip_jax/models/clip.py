"""CLIP's two towers: text (FLUX reads its pooled state) and vision (the adapter reads its hidden states).

Source: Radford et al., arXiv 2103.00020; transformers `CLIPTextModel`, `CLIPVisionModel` and their Flax forms, to whose
parameters ours map one to one, but that blocks are stacked (leading "layers" axis) and heads have an axis of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dynaip_jax import schema
from dynaip_jax.layers.basic import SMALL, embedding, parameter, scanned
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.hf import config_from_hf
from dynaip_jax.models.towers import (
    TowerBlock,
    TowerConfig,
    VisionTowerConfig,
    patches,
    position_table,
    tower_norm,
    tower_part,
)

LEGACY_EOS = 2  # the wrong `eos_token_id` of old config files: there the highest id marks the end of the text


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(TowerConfig):
    """Sizes of the text tower, in transformers' field names and with its defaults.

    Raises `ValueError` for sizes that do not fit.
    """

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407

    def __post_init__(self):
        if type(self.eos_token_id) is not int:
            raise ValueError(f"eos_token_id {self.eos_token_id!r}: expected one whole number")
        super().__post_init__()
        schema.check_total(self.vocab_size * self.hidden_size)

    @classmethod
    def large(cls, **changes) -> CLIPTextConfig:
        """CLIP-L, FLUX's pooled text encoder: 768 wide, 12 blocks, 77 tokens."""
        return cls(**{**dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12), **changes})

    @classmethod
    def tiny(cls, **changes) -> CLIPTextConfig:
        """For tests and the embedded default: 32 wide, 2 blocks, the real 77 tokens."""
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        return cls(**{**sizes, "vocab_size": 128, "eos_token_id": 127, **changes})

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **changes) -> CLIPTextConfig:
        """The config in the dictionary of a transformers CLIP `config.json`, of the text tower or of both.

        `changes` are fields of ours. Raises `UserError` for another kind of model or activation and for sizes that do
        not fit.
        """
        return config_from_hf(cls, tower_part(hf, "text_config"), dict(model_type=("clip_text_model",)), changes)


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(VisionTowerConfig):
    """Sizes of the vision tower, in transformers' field names and with its defaults.

    Images are squares of `image_size` pixels, cut in squares of `patch_size`. Raises `ValueError` for sizes that do not
    fit.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32

    @property
    def tokens(self) -> int:
        """Rows of a hidden state: the class token, then the patches row by row."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @classmethod
    def large(cls, **changes) -> CLIPVisionConfig:
        """ViT-L/14 at 224 pixels: 1024 wide, 24 blocks, 257 tokens."""
        sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
        return cls(**{**sizes, "patch_size": 14, **changes})

    @classmethod
    def tiny(cls, **changes) -> CLIPVisionConfig:
        """For tests and the embedded default: 32 wide, 4 blocks, 17 tokens of a 32-pixel image."""
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
        return cls(**{**sizes, "image_size": 32, "patch_size": 8, **changes})

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **changes) -> CLIPVisionConfig:
        """The config in the dictionary of a transformers CLIP `config.json`, of the vision tower or of both.

        `changes` are fields of ours. Raises `UserError` for another kind of model or activation, for images of other
        than 3 channels and for sizes that do not fit.
        """
        supported = dict(model_type=("clip_vision_model",), num_channels=(3,))
        return config_from_hf(cls, tower_part(hf, "vision_config"), supported, changes)


class CLIPText(nn.Module):
    """Token ids `input_ids` int `[b, t]` -> (last states, normed, `[b, t, c]`; pooled `[b, c]`) in `compute.dtype`.

    Pooled is the state of the first token `eos_token_id` (of the first row, if there is none); with the legacy value 2,
    of the highest id: transformers' own rule. Raises `ValueError` for more than `max_position_embeddings` tokens.
    """

    config: CLIPTextConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        c, p = self.config, self.compute
        b, t = input_ids.shape
        if t > c.max_position_embeddings:
            raise ValueError(f"{t} tokens: this text encoder takes at most {c.max_position_embeddings}")
        x = embedding(c.vocab_size, c.hidden_size, name="token_embedding", **p.dtypes)(input_ids)
        x = x + position_table(self, p, "position_embedding", c.max_position_embeddings, c.hidden_size)[:t]
        x, _ = scanned(TowerBlock, c.num_hidden_layers, remat=p.remat)(c, p, causal=True, name="blocks")(x)
        x = tower_norm(c, p, "final_layer_norm")(x)
        ends = input_ids if c.eos_token_id == LEGACY_EOS else input_ids == c.eos_token_id
        return x, x[jnp.arange(b), jnp.argmax(ends, axis=-1)]

    @staticmethod
    def inputs_spec(config: CLIPTextConfig, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`, by name, at full length."""
        return dict(input_ids=jax.ShapeDtypeStruct((batch, config.max_position_embeddings), jnp.int32))


class CLIPVision(nn.Module):
    """Images -> (hidden states, each `[b, m, c]`, in the order of `layers`; pooled `[b, c]` or None) in `compute.dtype`.

    `pixel_values` `[b, H, W, 3]`: normalised, channels last, H = W = `image_size`. `layers` are the indices of
    transformers' `hidden_states`: 0 = the normed embeddings, n = after block n; none has the post-layernorm. Row 0 is
    the class token. Blocks above the highest layer asked for are not computed; then there is no pooled state (the
    post-normed class token of the last block). The parameters are those of all blocks, whatever `layers` is. Raises
    `ValueError` for images of another shape and for layers that the model does not have.
    """

    config: CLIPVisionConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, pixel_values: jax.Array, layers: tuple[int, ...] = (10, 17, 24)
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        c, p = self.config, self.compute
        last = c.num_hidden_layers
        if not layers or not all(0 <= n <= last for n in layers):
            raise ValueError(f"layers {tuple(layers)}: this vision encoder has {last} blocks, so expected 0 to {last}")
        c.check_pixels(pixel_values)

        x = _with_class_token(self, p, patches(c, p)(pixel_values))
        x = tower_norm(c, p, "pre_layernorm")(
            x + position_table(self, p, "position_embedding", c.tokens, c.hidden_size)
        )
        blocks = scanned(TowerBlock, last, remat=p.remat)(c, p, name="blocks")
        post_layernorm = tower_norm(c, p, "post_layernorm")
        if self.is_initializing():  # parameters for every block and the last norm, whatever is asked for
            post_layernorm(blocks(x)[0])

        stacked: Any = self.get_variable("params", "blocks")
        block = scanned(TowerBlock, 1, remat=p.remat)(c, p, parent=None)
        wanted = np.asarray(layers)[:, None, None, None]

        def step(carry, n):
            x, states = carry
            x, _ = block.apply({"params": jax.tree.map(lambda p: jax.lax.dynamic_slice_in_dim(p, n, 1), stacked)}, x)
            return (x, jnp.where(wanted == n + 1, x, states)), None

        start = (x, jnp.broadcast_to(x, (len(layers), *x.shape)))
        (x, states), _ = jax.lax.scan(step, start, jnp.arange(max(layers)))
        return tuple(states), post_layernorm(x[:, 0]) if max(layers) == last else None

    @staticmethod
    def inputs_spec(config: CLIPVisionConfig, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the array arguments of `__call__`, by name."""
        return dict(pixel_values=jax.ShapeDtypeStruct((batch, config.image_size, config.image_size, 3), jnp.float32))


def _with_class_token(module: nn.Module, p: Compute, patches: jax.Array) -> jax.Array:
    """Patches `[b, rows, columns, c]` as rows `[b, m, c]` behind the learned class token."""
    width = patches.shape[-1]
    token = parameter(module, "class_embedding", SMALL, ("embed",), (width,), p.param_dtype).astype(p.dtype)
    rows = patches.reshape(patches.shape[0], -1, width)
    return jnp.concatenate([jnp.broadcast_to(token, (rows.shape[0], 1, width)), rows], axis=1)
