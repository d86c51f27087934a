"""HMoE-FFM: a hierarchical mixture of experts over CLIP layers.

The published abstract and reviews name the layers and the routing weights; the form of experts and router is this
project's reconstruction (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynaip_jax import schema
from dynaip_jax.layers.attention import attention
from dynaip_jax.layers.basic import LayerNorm, linear, parameter
from dynaip_jax.layers.compute import Compute

LEVEL_NAMES = ("low", "mid", "high")


@dataclass(frozen=True)
class HMoEConfig:
    """`levels`: indices into CLIP's hidden states, from low to high; `width`: of the tokens that come out; `router`: one set of
    weights per "image" or per "token"; `weights`: fixed ones, low to high, and no router; `resampler_tokens`: 0 keeps all tokens, otherwise a Perceiver reduces them to so many."""

    clip_width: int = 1024
    levels: tuple[int, ...] = (10, 17, 24)
    expert_width: int = 4096
    width: int = 3072
    router: str = "image"
    weights: tuple[float, float, float] | None = None
    resampler_tokens: int = 0
    resampler_depth: int = 2
    resampler_heads: int = 16

    def __post_init__(self):
        for name in ("levels", "weights"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.weights is not None and (len(self.weights) != 3 or min(self.weights) < 0 or sum(self.weights) <= 0):
            raise ValueError(f"weights {self.weights}: expected three non-negative numbers, not all zero")
        levels, none = (0, schema.BLOCKS[1]), (0, schema.SIZE[1])
        schema.check(
            self, levels=levels, resampler_tokens=none, resampler_depth=schema.BLOCKS, weights=(0, schema.SIZE[1])
        )
        if len(self.levels) != 3:
            raise ValueError(f"levels {self.levels}: expected three CLIP layers, low, mid and high")
        if self.router not in ("image", "token"):
            raise ValueError(f"router {self.router!r}: expected 'image' or 'token'")
        if self.resampler_tokens and self.width % self.resampler_heads:
            raise ValueError(f"width {self.width} is not a multiple of resampler_heads {self.resampler_heads}")
        experts = 3 * self.expert_width * (self.clip_width + self.width)
        resampler = self.resampler_depth * 12 * self.width**2 if self.resampler_tokens else 0
        schema.check_total(experts + resampler + self.resampler_tokens * self.width)


class HMoE(nn.Module):
    """`features`: three arrays `[b, m, clip_width]` -> tokens `[b, m or resampler_tokens, width]` and weights.

    F = sum_l w_l E_l(f_l) with experts E_l = Linear(GELU(Linear(LayerNorm(f)))) and w = softmax of the router, float32 `[b, 3]`
    (router "image") or `[b, m, 3]` ("token"). `granularity` `[b or 1, 3]`, non-negative, replaces the router's weights after
    being normalised to sum 1, but for rows of zeros; the weights returned are those used. Source: docs/method.md, "HMoE-FFM".
    """

    config: HMoEConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, features: Sequence[jax.Array], granularity: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        c, p = self.config, self.compute
        if len(features) != 3 or any(f.shape[-1] != c.clip_width for f in features):
            raise ValueError(
                f"HMoE: features {[f.shape for f in features]}; expected three arrays [b, m, {c.clip_width}]: "
                "use the CLIP that the adapter was made for"
            )
        if c.weights is None:
            weights = self._route(features)
        else:
            shape = (*(features[0].shape[:2] if c.router == "token" else features[0].shape[:1]), 3)
            weights = jnp.broadcast_to(jnp.asarray(c.weights) / sum(c.weights), shape)
        if granularity is not None:
            granularity = jnp.asarray(granularity, jnp.float32)
            granularity = granularity[:, None] if c.router == "token" else granularity
            total = granularity.sum(axis=-1, keepdims=True)
            weights = jnp.where(total > 0, granularity / jnp.where(total > 0, total, 1), weights)

        low, mid, high = (Expert(c, p, name=f"expert_{name}")(f) for name, f in zip(LEVEL_NAMES, features, strict=True))
        mix = (weights if c.router == "token" else weights[:, None]).astype(p.dtype)
        tokens = mix[..., 0, None] * low + mix[..., 1, None] * mid + mix[..., 2, None] * high
        if c.resampler_tokens:
            tokens = Resampler(c, p, name="resampler")(tokens)
        return tokens, weights

    def _route(self, features: Sequence[jax.Array]) -> jax.Array:
        x = jnp.concatenate(features, axis=-1).astype(jnp.float32)
        if self.config.router == "image":
            x = x.mean(axis=1)
        x = LayerNorm(param_dtype=self.compute.param_dtype, name="router_norm")(x)
        out = linear(
            3,
            ("channels", "channels"),
            param_dtype=self.compute.param_dtype,
            kernel_init=nn.initializers.zeros,
            name="router",
        )
        return jax.nn.softmax(out(x), axis=-1)


class Expert(nn.Module):
    """LayerNorm -> Linear -> GELU -> Linear, from CLIP's width to the adapter's."""

    config: HMoEConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, p = self.config, self.compute
        kw = p.dtypes
        x = LayerNorm(param_dtype=p.param_dtype, name="norm")(x.astype(p.dtype))
        x = nn.gelu(linear(c.expert_width, ("channels", "mlp"), name="in_layer", **kw)(x), approximate=True)
        return linear(c.width, ("mlp", "embed"), name="out_layer", **kw)(x)


class Resampler(nn.Module):
    """A Perceiver: learned queries `[r, width]` attend `resampler_depth` times to the tokens `[b, m, width]` -> `[b, r, width]`."""

    config: HMoEConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        c, p = self.config, self.compute
        kw = p.dtypes
        head_dim = c.width // c.resampler_heads
        init = nn.initializers.normal(c.width**-0.5)
        queries = parameter(self, "queries", init, (None, "embed"), (c.resampler_tokens, c.width), p.param_dtype)
        queries = queries.astype(p.dtype)
        x = jnp.broadcast_to(queries, (tokens.shape[0], *queries.shape))

        def norm(x, name):
            return LayerNorm(param_dtype=p.param_dtype, name=name)(x)

        def heads(x, name):
            return linear((c.resampler_heads, head_dim), ("embed", "heads", "head_dim"), name=name, **kw)(x)

        for i in range(c.resampler_depth):
            q = heads(norm(x, f"query_norm_{i}"), f"query_{i}")
            source = norm(tokens, f"token_norm_{i}")
            a = attention(q, heads(source, f"key_{i}"), heads(source, f"value_{i}"))
            x = x + linear(c.width, ("heads", "head_dim", "embed"), axis=(-2, -1), name=f"out_{i}", **kw)(a)
            h = linear(4 * c.width, ("embed", "mlp"), name=f"mlp_in_{i}", **kw)(norm(x, f"mlp_norm_{i}"))
            x = x + linear(c.width, ("mlp", "embed"), name=f"mlp_out_{i}", **kw)(nn.gelu(h, approximate=True))
        return x
