"""What the towers of CLIP and SigLIP share: pre-norm blocks of self-attention and MLP, tables of positions, patches.

Parameter names are those of transformers, but that blocks are stacked (leading "layers" axis) and heads have an axis of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynaip_jax import schema
from dynaip_jax.errors import UserError
from dynaip_jax.layers.attention import attention
from dynaip_jax.layers.basic import LECUN, SMALL, Conv, DenseGeneral, LayerNorm, linear, parameter
from dynaip_jax.layers.compute import Compute
from dynaip_jax.runtime.sharding import HEADS, ROWS, WIDE, constrain

ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
}
SIDES, TOKENS = (1, 1 << 14), (1, 1 << 14)  # of a picture in pixels; of a text


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """What all towers have, in transformers' field names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        ranges = dict(vocab_size=schema.WORDS, num_hidden_layers=schema.BLOCKS, layer_norm_eps=schema.EPSILON)
        schema.check(
            self, eos_token_id=(0, schema.WORDS[1]), image_size=SIDES, max_position_embeddings=TOKENS, **ranges
        )
        if self.hidden_size % self.num_attention_heads:
            heads = f"num_attention_heads {self.num_attention_heads}"
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {heads}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r}: expected one of {tuple(ACTIVATIONS)}")
        block = self.hidden_size * (4 * self.hidden_size + 2 * self.intermediate_size)
        schema.check_total(self.num_hidden_layers * block)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True, kw_only=True)
class VisionTowerConfig(TowerConfig):
    """Of towers that see: squares of `image_size` pixels, cut in squares of `patch_size`."""

    image_size: int
    patch_size: int

    def __post_init__(self):
        super().__post_init__()
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")

    def check_pixels(self, pixel_values: jax.Array) -> None:
        """Raises `ValueError` unless they are pictures `[b, image_size, image_size, 3]`."""
        shape = (self.image_size, self.image_size, 3)
        if pixel_values.shape[1:] != shape:
            raise ValueError(f"images of shape {pixel_values.shape[1:]}: expected {shape}, channels last")


class TowerBlock(nn.Module):
    """Self-attention, then the MLP, each on the normed stream `x` `[b, n, c]`; `causal`: no row sees a later one."""

    config: TowerConfig
    compute: Compute
    causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array):
        c, p = self.config, self.compute
        h = tower_norm(c, p, "layer_norm1")(x)
        heads = (c.num_attention_heads, c.head_dim)
        axes = ("embed", "heads", "head_dim")
        q, k, v = (constrain(dense(p, heads, axes, f"{name}_proj")(h), *HEADS) for name in "qkv")
        bias = jnp.triu(jnp.full((1, 1, x.shape[1], x.shape[1]), -jnp.inf), 1) if self.causal else None
        attn = attention(q, k, v, bias=bias, kernel=p.attention)
        x = x + dense(p, c.hidden_size, ("heads", "head_dim", "embed"), "out_proj", axis=(-2, -1))(attn)

        h = constrain(dense(p, c.intermediate_size, ("embed", "mlp"), "fc1")(tower_norm(c, p, "layer_norm2")(x)), *WIDE)
        x = x + dense(p, c.hidden_size, ("mlp", "embed"), "fc2")(ACTIVATIONS[c.hidden_act](h))
        return constrain(x, *ROWS), None


def tower_part(hf: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The part of a two-tower config under `key`. In old files `{key}_dict` takes its place, as in transformers."""
    if hf.get("model_type") not in ("clip", "siglip") and key not in hf:
        return hf
    part: Any = next((hf[k] for k in (f"{key}_dict", key) if hf.get(k) is not None), {})
    if not isinstance(part, Mapping):
        raise UserError(f"{key}: found {type(part).__name__}; expected an object; download it again")
    return part


def dense(p: Compute, features, axes, name: str, axis=-1) -> DenseGeneral:
    """A Linear with logical `axes`; see `basic.linear`."""
    return linear(features, axes, name=name, axis=axis, **p.dtypes)


def tower_norm(c: TowerConfig, p: Compute, name: str) -> LayerNorm:
    """A LayerNorm with the tower's epsilon."""
    return LayerNorm(eps=c.layer_norm_eps, param_dtype=p.param_dtype, name=name)


def position_table(module: nn.Module, p: Compute, name: str, rows: int, width: int) -> jax.Array:
    """A parameter `[rows, width]` with a row for each position, in the compute dtype."""
    return parameter(module, name, SMALL, (None, "embed"), (rows, width), p.param_dtype).astype(p.dtype)


def patches(c: VisionTowerConfig, p: Compute, *, use_bias: bool = False) -> Conv:
    """Pixels `[b, H, W, 3]` -> one vector for each patch `[b, rows, columns, c]`."""
    size = (c.patch_size, c.patch_size)
    init = nn.with_logical_partitioning(LECUN, (None, None, "channels", "embed"))
    return Conv(
        c.hidden_size, size, strides=size, padding="VALID", use_bias=use_bias, **p.dtypes,
        kernel_init=init, bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), name="patch_embedding",
    )  # fmt: skip
