"""InstantX's image-prompt adapter for FLUX.1-dev, as a producer of an `ImagePrompt`.

SigLIP's pooled state of a picture -> Linear, exact GELU, Linear to 128 tokens of the text encoder's width, LayerNorm; keys and values of
every block of both kinds by Linears without bias, keys RMS-normed per head without a scale, values not normed. The query is the block's
normed one before RoPE; the term joins the heads before the block's output projection: of image rows in dual-stream blocks, of text rows
too in single-stream ones. There `text_gain` is what acts on text rows: the same as `image_gain` is InstantX's own picture, 0 is DDS.
Several pictures are several subjects, whose terms add up.
Source: InstantX/FLUX.1-dev-IP-Adapter `IPAFluxAttnProcessor2_0` and `MLPProjModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dynaip_jax import schema
from dynaip_jax.adapters.ip_adapter import BANK, EPSILON, Read, bank, tokens_of
from dynaip_jax.layers.basic import LayerNorm, linear
from dynaip_jax.layers.compute import Compute
from dynaip_jax.layers.injection import Injection
from dynaip_jax.runtime.sharding import constrain
from dynaip_jax.types import KV, ImagePrompt, Sites

PROJECTION = "image_proj"  # public names
BLOCK = "ip_adapter.{}.to_{}_ip.weight"


@dataclass(frozen=True)
class InstantXConfig:
    """Sizes: `tokens` a picture, `width` of each; `embedding`: of SigLIP's pooled state; `hidden`: of the projection's middle; `depth`,
    `depth_single_blocks`, `num_heads`, `head_dim` are those of the base."""

    maker: ClassVar[str] = "InstantX"
    mark: ClassVar[str] = "ip_adapter.0.to_k_ip.weight"  # a tensor that only its files have
    encoder: ClassVar[str] = "siglip"
    reads: ClassVar[str] = "SigLIP's pooled state"

    tokens: int = 128
    width: int = 4096
    embedding: int = 1152
    hidden: int = 2304
    depth: int = 19
    depth_single_blocks: int = 38
    num_heads: int = 24
    head_dim: int = 128

    def __post_init__(self) -> None:
        schema.check(self, depth=(0, schema.BLOCKS[1]), depth_single_blocks=(0, schema.BLOCKS[1]))
        schema.check_total(self.hidden * (self.embedding + self.tokens * self.width))
        schema.check_total(2 * self.injected * self.width * self.num_heads * self.head_dim)

    @property
    def injection(self) -> Injection:
        """How the base's blocks are to use the image prompt."""
        return Injection(query="before_rope", merge=self.merge, site="before_projection")

    @property
    def merge(self) -> str:
        """Of several subjects, unless a call says otherwise."""
        return "sum"

    @property
    def blocks(self) -> str:
        """Which blocks are injected into, as `DynaIPConfig.blocks` has it."""
        return "all"

    @property
    def injected(self) -> int:
        """Number of injected blocks."""
        return self.depth + self.depth_single_blocks

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]], sites: Sites) -> InstantXConfig:
        """Read off a file's tensors, for a backbone's blocks and heads. Raises `KeyError` or `ValueError` for shapes that fit none."""
        (width,), (hidden, embedding) = shapes[f"{PROJECTION}.norm.weight"], shapes[f"{PROJECTION}.proj.0.weight"]
        last = f"{PROJECTION}.proj.2.weight"
        tokens = tokens_of(last, shapes[last][0], width)
        count = len({name.split(".")[1] for name in shapes if name.startswith("ip_adapter.")})
        single = count - sites.double
        if single < 0:
            raise ValueError(f"{count} blocks, expected {sites.double + sites.single}")
        return cls(tokens, width, embedding, hidden, sites.double, single, sites.heads, sites.head_dim)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of a public file of these sizes."""
        inner, rows = self.num_heads * self.head_dim, self.tokens * self.width
        return {
            f"{PROJECTION}.proj.0.weight": (self.hidden, self.embedding),
            f"{PROJECTION}.proj.0.bias": (self.hidden,),
            f"{PROJECTION}.proj.2.weight": (rows, self.hidden),
            f"{PROJECTION}.proj.2.bias": (rows,),
            f"{PROJECTION}.norm.weight": (self.width,),
            f"{PROJECTION}.norm.bias": (self.width,),
        } | {BLOCK.format(n, kind): (inner, self.width) for n in range(self.injected) for kind in "kv"}

    def tree(self, read: Read) -> dict[str, Any]:
        """The parameters of `InstantX(self)` in a public file."""
        p, tokens = PROJECTION, (self.tokens, self.width)

        def stacked(kind: str) -> np.ndarray:
            shape = (self.width, self.num_heads, self.head_dim)
            return np.stack([read(BLOCK.format(n, kind), *shape) for n in range(self.injected)])

        return dict(
            proj_in=dict(
                kernel=read(f"{p}.proj.0.weight", self.embedding, self.hidden),
                bias=read(f"{p}.proj.0.bias", self.hidden),
            ),
            proj_out=dict(
                kernel=read(f"{p}.proj.2.weight", self.hidden, *tokens), bias=read(f"{p}.proj.2.bias", *tokens)
            ),
            norm=dict(scale=read(f"{p}.norm.weight", self.width), bias=read(f"{p}.norm.bias", self.width)),
            key=stacked("k"),
            value=stacked("v"),
        )

    def module(self, compute: Compute) -> InstantX:
        """The adapter of these sizes."""
        return InstantX(self, compute)


class InstantX(nn.Module):
    """The adapter. `embedding` `[b, s, embedding]`: SigLIP's pooled state of each subject's picture; the other arguments as in `DynaIP`,
    where `granularity` has to be None. Returns the `ImagePrompt`; its text rows are those of the single-stream blocks."""

    config: InstantXConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self,
        embedding: jax.Array,
        *,
        image_gain: Any = 1.0,
        text_gain: Any = 0.0,
        region: Any = None,
        words: Any = None,
    ) -> ImagePrompt:
        c, p = self.config, self.compute
        b, s = embedding.shape[:2]
        x = linear(c.hidden, ("channels", "mlp"), name="proj_in", **p.dtypes)(embedding)
        x = nn.gelu(x, approximate=False)
        tokens = linear((c.tokens, c.width), ("mlp", None, "embed"), name="proj_out", **p.dtypes)(x)
        tokens = LayerNorm(eps=EPSILON, param_dtype=p.param_dtype, name="norm")(tokens)
        shape = (c.injected, c.width, c.num_heads, c.head_dim)
        keys = constrain(_normed(bank(self, p, "key", tokens, shape)), *BANK)
        values = constrain(bank(self, p, "value", tokens, shape), *BANK)

        def gain(g: Any) -> jax.Array:
            return jnp.broadcast_to(jnp.asarray(g, jnp.float32), (c.injected, b, s))

        double, single = (KV(keys[rows], values[rows]) for rows in (slice(c.depth), slice(c.depth, None)))
        in_single = (jnp.arange(c.injected) >= c.depth)[:, None, None]
        return ImagePrompt(double, single, gain(image_gain), gain(text_gain) * in_single, region, words)


def _normed(x: jax.Array) -> jax.Array:
    """Heads `[..., d]` over their root mean square, in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPSILON)).astype(x.dtype)
