"""The decoder of Qwen3 as a text encoder: hidden states between its blocks, joined token by token.

Source: transformers `Qwen3Model`; Yang et al., arXiv 2505.09388. Tokens see themselves and those before them, and no padding. Blocks
are stacked (leading "layers" axis), and end where the last state that is asked for is there: what comes after it is never kept.
The residual stream is float32 whatever `dtype` is: a few of its channels grow past a thousand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynaip_jax import schema
from dynaip_jax.errors import UserError, shortened
from dynaip_jax.layers.attention import attention
from dynaip_jax.layers.basic import DenseGeneral, RMSNorm, embedding, linear, scanned
from dynaip_jax.layers.compute import Compute
from dynaip_jax.layers.positions import rope_table
from dynaip_jax.models.hf import config_from_hf
from dynaip_jax.runtime.sharding import HEADS, ROWS, WIDE, constrain

STATES = (9, 18, 27)  # that the published checkpoints' transformers read


@dataclass(frozen=True)
class Qwen3Config:
    """Sizes of the decoder, in transformers' field names.

    `states`: which hidden states are given, in the order in which they are joined; n is the stream after n blocks. There are as
    many blocks as the last of them needs. Raises `ValueError` for sizes that do not fit each other.
    """

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    states: tuple[int, ...] = STATES

    def __post_init__(self):
        object.__setattr__(self, "states", tuple(self.states))
        ranges = dict(vocab_size=schema.WORDS, states=schema.BLOCKS, rms_norm_eps=schema.EPSILON, rope_theta=(1, 1e9))
        schema.check(self, **ranges)
        if not self.states:
            raise ValueError("states (): expected at least one")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads}: expected a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim}: expected an even number")
        heads = (2 * self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        block = self.hidden_size * (heads + 3 * self.intermediate_size)
        schema.check_total(self.vocab_size * self.hidden_size + self.blocks * block)

    @property
    def blocks(self) -> int:
        """How many blocks the states need."""
        return max(self.states)

    @property
    def width(self) -> int:
        """Numbers a token in the result."""
        return len(self.states) * self.hidden_size

    @classmethod
    def of_4b(cls, **changes) -> Qwen3Config:
        """Qwen3-4B up to the 27th of its 36 blocks: 3.1 B parameters."""
        return cls(**changes)

    @classmethod
    def of_8b(cls, **changes) -> Qwen3Config:
        """Qwen3-8B up to the 27th of its 36 blocks: 5.8 B parameters."""
        return cls(**{**dict(hidden_size=4096, intermediate_size=12288), **changes})

    @classmethod
    def tiny(cls, **changes) -> Qwen3Config:
        """For tests: 16 wide, 3 blocks, a state after each."""
        sizes = dict(vocab_size=128, hidden_size=16, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
        return cls(**{**sizes, **dict(head_dim=8, states=(1, 2, 3)), **changes})

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **changes) -> Qwen3Config:
        """The config in the dictionary of a transformers Qwen3 `config.json`; `changes` are fields of ours.

        Raises `UserError` for other decoders, for scaled positions, for fewer blocks than the states need, and for sizes that do not fit.
        """
        supported: dict[str, tuple] = dict(
            model_type=("qwen3",), hidden_act=("silu",), attention_bias=(False,), use_sliding_window=(False,)
        )
        rope = hf.get("rope_parameters")  # transformers 5; before, `rope_theta` stood beside a `rope_scaling`
        rope = rope if isinstance(rope, Mapping) else {}
        scaled = hf.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
        if scaled:
            raise UserError(
                f"rope {shortened(repr(scaled), 60)}: expected positions that are not scaled; use a checkpoint of that kind"
            )
        theta = {"rope_theta": float(rope["rope_theta"])} if "rope_theta" in rope else {}
        config = config_from_hf(cls, {**hf, **theta}, supported, changes)
        if config.blocks > hf["num_hidden_layers"]:
            raise UserError(
                f"num_hidden_layers {hf['num_hidden_layers']}: expected at least {config.blocks}; use a checkpoint of that kind"
            )
        return config


class Qwen3Block(nn.Module):
    """Causal attention, then the gated MLP, each on the normed residual stream `x` `[b, t, c]` (float32).

    Carries with it the `taken` states `[k, b, t, c]`; the `index`-th block, from 1, fills those that are asked of it.
    """

    config: Qwen3Config
    compute: Compute

    @nn.compact
    def __call__(self, carry, index: jax.Array, bias: jax.Array, rope):
        (x, taken), c, p = carry, self.config, self.compute
        h = _norm(c, p, "attn_norm", "embed")(x).astype(p.dtype)
        q = _heads(p, c.num_attention_heads, c, "q")(h)
        k, v = (_heads(p, c.num_key_value_heads, c, name)(h) for name in "kv")
        q, k = (_rotated(_norm(c, p, f"{n}_norm", None)(y), rope) for n, y in (("q", q), ("k", k)))
        k, v = (jnp.repeat(y, c.num_attention_heads // c.num_key_value_heads, axis=2) for y in (k, v))
        q, k, v = (constrain(y, *HEADS) for y in (q, k, v))
        attn = attention(q, k, v, bias=bias, kernel=p.attention)
        x = x + _linear(p, c.hidden_size, ("heads", "head_dim", "embed"), "o", axis=(-2, -1))(attn)

        h = _norm(c, p, "mlp_norm", "embed")(x).astype(p.dtype)
        gate, up = (constrain(_linear(p, c.intermediate_size, ("embed", "mlp"), n)(h), *WIDE) for n in ("gate", "up"))
        x = constrain(x + _linear(p, c.hidden_size, ("mlp", "embed"), "down")(nn.silu(gate) * up), *ROWS)
        own = (jnp.asarray(c.states) == index)[:, None, None, None]
        return (x, jnp.where(own, x.astype(taken.dtype), taken)), None


class Qwen3(nn.Module):
    """Token ids `input_ids` int `[b, t]` -> the hidden states asked for, joined, `[b, t, config.width]` in `compute.dtype`.

    Padding is written as ~id (below zero): it is embedded as that token and has values of its own, but no other token sees it.
    """

    config: Qwen3Config
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> jax.Array:
        c, p = self.config, self.compute
        b, t = input_ids.shape
        padding = input_ids < 0
        ids = jnp.where(padding, ~input_ids, input_ids)
        x = embedding(c.vocab_size, c.hidden_size, name="embed_tokens", **p.dtypes)(ids).astype(jnp.float32)

        seen = jnp.tril(jnp.ones((t, t), bool)) & ~padding[:, None]
        bias = jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)[:, None]
        rope = rope_table(jnp.arange(t)[None, :, None].astype(jnp.float32), (c.head_dim,), c.rope_theta)
        blocks = scanned(Qwen3Block, c.blocks, remat=p.remat, in_axes=(0, nn.broadcast, nn.broadcast))
        start = (x, jnp.zeros((len(c.states), b, t, c.hidden_size), p.dtype))
        (_, taken), _ = blocks(c, p, name="blocks")(start, jnp.arange(1, c.blocks + 1), bias, rope)
        return jnp.moveaxis(taken, 0, 2).reshape(b, t, c.width)

    @staticmethod
    def inputs_spec(config: Qwen3Config, batch: int = 1, text_rows: int = 8) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`, by name (any config takes any length)."""
        return dict(input_ids=jax.ShapeDtypeStruct((batch, text_rows), jnp.int32))


def _rotated(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """`x` `[b, t, h, d]`, pairs (n, n + d/2) of the last axis rotated in float32; `rope` as from `rope_table`."""
    cos, sin = (r[..., None, :] for r in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _norm(c: Qwen3Config, p: Compute, name: str, axis: str | None) -> RMSNorm:
    return RMSNorm(eps=c.rms_norm_eps, axis_name=axis, param_dtype=p.param_dtype, name=name)


def _heads(p: Compute, heads: int, c: Qwen3Config, name: str) -> DenseGeneral:
    return _linear(p, (heads, c.head_dim), ("embed", "heads", "head_dim"), name)


def _linear(p: Compute, features, axes, name: str, axis=-1) -> DenseGeneral:
    return linear(features, axes, name=name, axis=axis, use_bias=False, **p.dtypes)
