"""Image-prompt adapters that others published for the backbone, as producers of an `ImagePrompt`.

XLabs': CLIP's projected embedding of a picture -> one Linear to a few tokens of the text encoder's width, LayerNorm; keys and values of
every dual-stream block by Linears with bias, neither normed. The query is the block's normed one before RoPE; the term goes to the image
rows after the block, ungated. Several pictures are several subjects, whose terms add up.
Sources: XLabs-AI/x-flux `IPDoubleStreamBlockProcessor` and `ImageProjModel`; diffusers `FluxIPAdapterAttnProcessor`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dynaip_jax import schema
from dynaip_jax.layers.basic import LayerNorm, linear, parameter
from dynaip_jax.layers.compute import Compute
from dynaip_jax.layers.injection import Injection
from dynaip_jax.runtime.sharding import constrain
from dynaip_jax.types import KV, ImagePrompt, Sites

EPSILON = 1e-5  # of torch's LayerNorm
Read = Callable[..., np.ndarray]  # the tensor of a public name, a matrix `[in, out]`, in the shape given after the name
PROJECTION = "ip_adapter_proj_model"  # public names
BLOCK = "double_blocks.{}.processor.ip_adapter_double_stream_{}_proj"
BANK = ("layers", "batch", None, None, "heads", "head_dim")  # logical axes of keys and values


@dataclass(frozen=True)
class IPAdapterConfig:
    """Sizes: `tokens` a picture, `width` of each; `embedding`: of CLIP's projected embedding; `depth`, `num_heads`, `head_dim` are the
    dual-stream blocks of the base."""

    maker: ClassVar[str] = "XLabs"
    mark: ClassVar[str] = f"{PROJECTION}.proj.weight"  # a tensor that only its files have
    encoder: ClassVar[str] = "clip_vision"
    reads: ClassVar[str] = "CLIP's embedding"

    tokens: int = 4
    width: int = 4096
    embedding: int = 768
    depth: int = 19
    num_heads: int = 24
    head_dim: int = 128

    def __post_init__(self) -> None:
        schema.check(self, depth=schema.BLOCKS)
        schema.check_total(
            self.width * (self.tokens * self.embedding + 2 * self.depth * self.num_heads * self.head_dim)
        )

    @property
    def injection(self) -> Injection:
        """How the base's blocks are to use the image prompt."""
        return Injection(query="before_rope", merge=self.merge, site="residual")

    @property
    def merge(self) -> str:
        """Of several subjects, unless a call says otherwise."""
        return "sum"

    @property
    def blocks(self) -> str:
        """Which blocks are injected into, as `DynaIPConfig.blocks` has it."""
        return "double"

    @property
    def injected(self) -> int:
        """Number of injected blocks."""
        return self.depth

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]], sites: Sites) -> IPAdapterConfig:
        """Read off a file's tensors, for a backbone's heads. Raises `KeyError` or `ValueError` for shapes that fit none."""
        (width,), (rows, embedding) = shapes[f"{PROJECTION}.norm.weight"], shapes[f"{PROJECTION}.proj.weight"]
        tokens = tokens_of(f"{PROJECTION}.proj.weight", rows, width)
        depth = len({name.split(".")[1] for name in shapes if name.startswith("double_blocks.")})
        return cls(tokens, width, embedding, depth, sites.heads, sites.head_dim)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of a public file of these sizes."""
        inner, rows = self.num_heads * self.head_dim, self.tokens * self.width
        expected: dict[str, tuple[int, ...]] = {
            f"{PROJECTION}.proj.weight": (rows, self.embedding),
            f"{PROJECTION}.proj.bias": (rows,),
            f"{PROJECTION}.norm.weight": (self.width,),
            f"{PROJECTION}.norm.bias": (self.width,),
        }
        for n in range(self.depth):
            for kind in "kv":
                expected |= {
                    f"{BLOCK.format(n, kind)}.weight": (inner, self.width),
                    f"{BLOCK.format(n, kind)}.bias": (inner,),
                }
        return expected

    def tree(self, read: Read) -> dict[str, Any]:
        """The parameters of `IPAdapter(self)` in a public file."""
        heads = (self.num_heads, self.head_dim)

        def stacked(kind: str, end: str, *shape: int) -> np.ndarray:
            return np.stack([read(f"{BLOCK.format(n, kind)}.{end}", *shape) for n in range(self.depth)])

        return dict(
            proj=dict(
                kernel=read(f"{PROJECTION}.proj.weight", self.embedding, self.tokens, self.width),
                bias=read(f"{PROJECTION}.proj.bias", self.tokens, self.width),
            ),
            norm=dict(
                scale=read(f"{PROJECTION}.norm.weight", self.width), bias=read(f"{PROJECTION}.norm.bias", self.width)
            ),
            key=stacked("k", "weight", self.width, *heads),
            key_bias=stacked("k", "bias", *heads),
            value=stacked("v", "weight", self.width, *heads),
            value_bias=stacked("v", "bias", *heads),
        )

    def module(self, compute: Compute) -> IPAdapter:
        """The adapter of these sizes."""
        return IPAdapter(self, compute)


class IPAdapter(nn.Module):
    """The adapter. `embedding` `[b, s, embedding]`: CLIP's projected embedding of each subject's picture; the other arguments as in
    `DynaIP`, where `granularity` has to be None. Returns the `ImagePrompt`."""

    config: IPAdapterConfig
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
        tokens = linear((c.tokens, c.width), ("channels", None, "embed"), name="proj", **p.dtypes)(embedding)
        tokens = LayerNorm(eps=EPSILON, param_dtype=p.param_dtype, name="norm")(tokens)

        def project(name: str) -> jax.Array:
            bias_axes, bias_shape = ("layers", "heads", "head_dim"), (c.depth, c.num_heads, c.head_dim)
            bias = parameter(self, f"{name}_bias", nn.initializers.zeros, bias_axes, bias_shape, p.param_dtype)
            x = bank(self, p, name, tokens, (c.depth, c.width, c.num_heads, c.head_dim))
            return constrain(x + bias.astype(p.dtype)[:, None, None, None], *BANK)

        def gain(g: Any) -> jax.Array:
            return jnp.broadcast_to(jnp.asarray(g, jnp.float32), (c.depth, b, s))

        keys = KV(project("key"), project("value"))
        return ImagePrompt(keys, None, gain(image_gain), gain(text_gain), region, words)


def tokens_of(name: str, rows: int, width: int) -> int:
    """How many tokens of `width` the matrix `name` with so many rows makes. Raises `ValueError` if it makes none."""
    tokens, rest = divmod(rows, width)
    if rest or not tokens:
        raise ValueError(f"{rows} rows of {name}, expected a multiple of {width}")
    return tokens


def bank(module: nn.Module, p: Compute, name: str, tokens: jax.Array, shape: tuple[int, int, int, int]) -> jax.Array:
    """`tokens` `[b, s, m, w]` by a matrix of `module` for each block, of `shape` `[l, w, h, d]` -> `[l, b, s, m, h, d]`."""
    lecun = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=(2, 3), batch_axis=0)
    kernel = parameter(module, name, lecun, ("layers", "embed", "heads", "head_dim"), shape, p.param_dtype)
    return jnp.einsum("bsmw,lwhd->lbsmhd", tokens.astype(p.dtype), kernel.astype(p.dtype))


def abstract_ip_adapter_params(config: Any, compute: Compute = Compute()) -> dict[str, Any]:
    """Shapes and dtypes of the parameters of an adapter of others (its `config`: this file's, or `InstantXConfig`), nothing allocated,
    each in the box that holds its logical axis names."""
    embedding = jax.ShapeDtypeStruct((1, 1, config.embedding), jnp.float32)
    return jax.eval_shape(config.module(compute).init, jax.random.key(0), embedding)["params"]
