"""The encoder of T5 v1.1 (gated GELU), as FLUX reads its prompts: every token attends to every token, padding too.

Source: transformers `T5EncoderModel`; Raffel et al., arXiv 1910.10683; Shazeer, arXiv 2002.05202 (gated GELU). Blocks
are stacked (leading "layers" axis). The residual stream is float32 whatever `dtype` is: T5-XXL's outgrows float16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dynaip_jax import schema
from dynaip_jax.layers.attention import attention
from dynaip_jax.layers.basic import SMALL, DenseGeneral, RMSNorm, embedding, linear, parameter, scanned
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.hf import config_from_hf
from dynaip_jax.runtime.sharding import HEADS, ROWS, WIDE, constrain


@dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder, in transformers' field names and with its defaults. Raises `ValueError` for sizes that do not fit."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_heads: int = 8
    num_layers: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        buckets, distance = "relative_attention_num_buckets", "relative_attention_max_distance"
        schema.check(self, vocab_size=schema.WORDS, num_layers=schema.BLOCKS, layer_norm_epsilon=schema.EPSILON)
        if self.relative_attention_num_buckets % 4:
            raise ValueError(f"{buckets} {self.relative_attention_num_buckets}: expected a multiple of 4")
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            longest = self.relative_attention_max_distance
            raise ValueError(f"{distance} {longest}: expected more than a quarter of {buckets}")
        block = self.d_model * (4 * self.num_heads * self.d_kv + 3 * self.d_ff)
        schema.check_total(self.vocab_size * self.d_model + self.num_layers * block)

    @classmethod
    def xxl(cls, **changes) -> T5Config:
        """T5-v1.1-XXL, FLUX's text encoder: 4.8 B parameters."""
        return cls(**{**dict(d_model=4096, d_ff=10240, num_heads=64, num_layers=24), **changes})

    @classmethod
    def tiny(cls, **changes) -> T5Config:
        """For tests and the embedded default: 32 wide, 2 blocks."""
        return cls(**{**dict(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2), **changes})

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **changes) -> T5Config:
        """The config in the dictionary of a transformers T5 `config.json`; `changes` are fields of ours.

        Raises `UserError` for other kinds of T5 (ReLU, ungated, UMT5, a decoder) and for sizes that do not fit.
        """
        hf = {"feed_forward_proj": "relu"} | dict(hf)  # transformers' default, which we do not support
        supported: dict[str, tuple] = dict(
            model_type=("t5",), feed_forward_proj=("gated-gelu",), dense_act_fn=("gelu_new",), is_decoder=(False,)
        )
        return config_from_hf(cls, hf, supported, changes)


def relative_position_bucket(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Row of the bias table for each (query, key) position, int32 `[length, length]`; keys after it use the upper half.

    In each half, distances below a quarter of `buckets` have a row of their own; larger ones share rows, evenly in log
    distance up to `max_distance`. In float32, as in transformers: the borders between rows depend on it.
    """
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    distance = np.abs(relative)
    log_steps = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(max_distance / exact)
    coarse = np.minimum(exact + (log_steps * (half - exact)).astype(np.int32), half - 1)
    return (np.where(relative > 0, half, 0) + np.where(distance < exact, distance, coarse)).astype(np.int32)


class T5Block(nn.Module):
    """Self-attention, then the gated MLP, each on the normed residual stream `x` `[b, t, c]` (float32)."""

    config: T5Config
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array):
        c, p = self.config, self.compute
        h = _norm(c, p, "attn_norm")(x)
        heads, axes = (c.num_heads, c.d_kv), ("embed", "heads", "head_dim")
        q, k, v = (constrain(_linear(p, heads, axes, name)(h), *HEADS) for name in "qkv")
        attn = attention(q, k, v, bias=bias, scale=1.0, kernel=p.attention)
        x = x + _linear(p, c.d_model, ("heads", "head_dim", "embed"), "o", axis=(-2, -1))(attn)

        h = _norm(c, p, "mlp_norm")(x)
        gate, h = (constrain(_linear(p, c.d_ff, ("embed", "mlp"), name)(h), *WIDE) for name in ("wi_0", "wi_1"))
        h = nn.gelu(gate, approximate=True) * h
        wide = jnp.float32 if p.dtype == jnp.float16 else p.dtype  # this product outgrows float16 in T5-XXL
        return constrain(x + _linear(p, c.d_model, ("mlp", "embed"), "wo", dtype=wide)(h), *ROWS), None


class T5Encoder(nn.Module):
    """Token ids `input_ids` int `[b, t]` -> states `[b, t, d_model]` in `compute.dtype`, after the final norm.

    There is no mask: padding is read like any token, as FLUX was trained. Any length `t` is taken.
    """

    config: T5Config
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> jax.Array:
        c, p = self.config, self.compute
        x = embedding(c.vocab_size, c.d_model, name="shared", **p.dtypes)(input_ids)
        shape = (c.relative_attention_num_buckets, c.num_heads)
        table = parameter(self, "relative_attention_bias", SMALL, (None, "heads"), shape, p.param_dtype)
        rows = relative_position_bucket(input_ids.shape[1], shape[0], c.relative_attention_max_distance)
        bias = jnp.moveaxis(table.astype(jnp.float32)[rows], -1, 0)[None]

        blocks = scanned(T5Block, c.num_layers, remat=p.remat, in_axes=(nn.broadcast,))
        x, _ = blocks(c, p, name="blocks")(x.astype(jnp.float32), bias)
        return _norm(c, p, "final_norm")(x).astype(p.dtype)

    @staticmethod
    def inputs_spec(config: T5Config, batch: int = 1, text_rows: int = 8) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`, by name (any config takes any length)."""
        return dict(input_ids=jax.ShapeDtypeStruct((batch, text_rows), jnp.int32))


def _norm(c: T5Config, p: Compute, name: str) -> RMSNorm:
    return RMSNorm(eps=c.layer_norm_epsilon, axis_name="embed", param_dtype=p.param_dtype, name=name)


def _linear(p: Compute, features, axes, name: str, axis=-1, dtype: DTypeLike | None = None) -> DenseGeneral:
    dtype = p.dtype if dtype is None else dtype
    return linear(features, axes, name=name, axis=axis, use_bias=False, dtype=dtype, param_dtype=p.param_dtype)
