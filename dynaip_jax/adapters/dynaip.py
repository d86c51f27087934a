"""DynaIP: reference features -> HMoE tokens -> the K/V bank of every injected block -> `ImagePrompt`.

Follows the published abstract and reviews; what they leave open is this project's reconstruction (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynaip_jax import choices, schema
from dynaip_jax.adapters.hmoe import HMoE, HMoEConfig
from dynaip_jax.layers.basic import parameter, shapes_of
from dynaip_jax.layers.compute import Compute
from dynaip_jax.layers.injection import Injection
from dynaip_jax.runtime import shapes
from dynaip_jax.runtime.sharding import constrain
from dynaip_jax.types import KV, ImagePrompt, Sites


@dataclass(frozen=True)
class DynaIPConfig:
    """`depth`, `depth_single_blocks`, `num_heads`, `head_dim` are the base transformer's. `blocks`: "double" injects into the
    dual-branch blocks, "all" also into the single-stream ones. `query`, `merge`, `site`: how the base is to compute and add the
    reference term (see `layers.injection.Injection`)."""

    hmoe: HMoEConfig = field(default_factory=HMoEConfig)
    blocks: str = "all"
    query: str = "before_rope"
    merge: str = "sum"
    site: str = "before_projection"
    depth: int = 19
    depth_single_blocks: int = 38
    num_heads: int = 24
    head_dim: int = 128

    def __post_init__(self):
        blocks = (0, schema.BLOCKS[1])
        schema.check(self, depth=blocks, depth_single_blocks=blocks)
        choices.check("blocks", self.blocks, ("double", "all"))
        Injection(self.query, self.merge, self.site)  # checks them
        schema.check_total(2 * self.injected * self.hmoe.width * self.num_heads * self.head_dim)

    @property
    def injection(self) -> Injection:
        """How the base's blocks are to use the image prompt."""
        return Injection(query=self.query, merge=self.merge, site=self.site)

    @property
    def injected(self) -> int:
        """Number of injected blocks."""
        return self.depth + (self.depth_single_blocks if self.blocks == "all" else 0)

    @classmethod
    def for_base(cls, sites: Sites, clip_width: int, hmoe: dict | None = None, **changes) -> DynaIPConfig:
        """For a backbone's `sites` and a CLIP of `clip_width`, as wide as the backbone unless `hmoe` says otherwise."""
        return cls(
            hmoe=HMoEConfig(**dict(clip_width=clip_width, width=sites.width) | (hmoe or {})),
            depth=sites.double,
            depth_single_blocks=sites.single,
            num_heads=sites.heads,
            head_dim=sites.head_dim,
            **changes,
        )


class DynaIP(nn.Module):
    """The adapter. `__call__` arguments:

    - `features`: three arrays `[b, s, m, clip_width]`, CLIP's hidden states of each subject's picture, low to high;
    - `image_gain`, `text_gain`: scalar, `[s]` or `[b, s]`. Training: 1 and 1. Inference: the user's scale, and 0 (DDS);
    - `granularity`: None (the router decides) or non-negative `[3]`, `[s, 3]` or `[b, s, 3]`, normalised here; the router also
      decides where all three are 0;
    - `region`: `[b or 1, s, i]` or None; `words`: `[b or 1, s, t]` or None. Both: see `ImagePrompt`.

    Returns the `ImagePrompt` and the routing weights used, float32 `[b, s, 3]` (router "token": `[b, s, m, 3]`).
    K = RMSNorm(F W_k), V = F W_v, per head; W_v starts at zero, so that a fresh adapter changes nothing.
    """

    config: DynaIPConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, features: Sequence[jax.Array], *, image_gain=1.0, text_gain=1.0, granularity=None, region=None, words=None
    ) -> tuple[ImagePrompt, jax.Array]:
        c, p = self.config, self.compute
        b, s = features[0].shape[:2]
        if granularity is not None:
            granularity = jnp.broadcast_to(jnp.asarray(granularity, jnp.float32), (b, s, 3)).reshape(b * s, 3)
        flat = [f.reshape(b * s, *f.shape[2:]) for f in features]
        tokens, weights = HMoE(c.hmoe, p, name="hmoe")(flat, granularity)
        tokens = tokens.reshape(b, s, *tokens.shape[1:])

        def gain(g):
            return jnp.broadcast_to(jnp.asarray(g, jnp.float32), (c.injected, b, s))

        prompt = ImagePrompt(
            double=Bank(c, p, c.depth, name="double")(tokens),
            single=Bank(c, p, c.depth_single_blocks, name="single")(tokens) if c.blocks == "all" else None,
            image_gain=gain(image_gain),
            text_gain=gain(text_gain),
            region=region,
            words=words,
        )
        return prompt, weights.reshape(b, s, *weights.shape[1:])


class Bank(nn.Module):
    """Keys and values `[l, b, s, m, h, d]` of `length` blocks from the tokens `[b, s, m, width]`."""

    config: DynaIPConfig
    compute: Compute
    length: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> KV:
        c, p = self.config, self.compute
        shape = (self.length, tokens.shape[-1], c.num_heads, c.head_dim)

        def project(name, init):
            axes = ("layers", "embed", "heads", "head_dim")
            kernel = parameter(self, name, init, axes, shape, p.param_dtype)
            x = jnp.einsum("bsmw,lwhd->lbsmhd", tokens.astype(p.dtype), kernel.astype(p.dtype))
            return constrain(x, "layers", "batch", None, None, "heads", "head_dim")

        lecun = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=(2, 3), batch_axis=0)
        k, v = project("key", lecun), project("value", nn.initializers.zeros)
        axes = ("layers", "head_dim")
        scale = parameter(self, "key_norm", nn.initializers.ones, axes, (self.length, c.head_dim), p.param_dtype)
        scale = scale.astype(jnp.float32)
        k32 = k.astype(jnp.float32)
        k32 = k32 * jax.lax.rsqrt(jnp.mean(k32 * k32, axis=-1, keepdims=True) + 1e-6)
        return KV((k32 * scale[:, None, None, None, None]).astype(p.dtype), v)


def init_adapter_params(
    config: DynaIPConfig, key: jax.Array, compute: Compute = Compute(), *, boxed: bool = False
) -> dict[str, Any]:
    """Fresh parameters of an adapter: with them the base model is left exactly as it is. `boxed` leaves each in the box
    that holds its logical axis names."""
    features = [jnp.zeros((1, 1, 2, config.hmoe.clip_width))] * 3
    params = DynaIP(config, compute).init(key, features)["params"]
    return params if boxed else nn.meta.unbox(params)


def abstract_adapter_params(
    config: DynaIPConfig, compute: Compute = Compute(), *, boxed: bool = False
) -> dict[str, Any]:
    """Shapes and dtypes of the adapter's parameters, nothing allocated; `boxed`: see `init_adapter_params`."""
    params = _abstract_boxed(config, compute)
    return jax.tree.map(lambda x: x, params) if boxed else nn.meta.unbox(params)


@lru_cache(maxsize=64)
def _abstract_boxed(config: DynaIPConfig, compute: Compute) -> dict[str, Any]:
    def find() -> dict[str, Any]:
        return shapes_of(lambda: init_adapter_params(config, jax.random.key(0), compute, boxed=True))

    return shapes.kept(shapes.named(DynaIP(config, compute)), find)
