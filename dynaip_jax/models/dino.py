"""DINO and DINOv2: vision transformers whose class token tells subjects apart, for measuring how well one is kept.

Source: Caron et al., arXiv 2104.14294; Oquab et al., arXiv 2304.07193; transformers `ViTModel`, `Dinov2Model`, to whose parameters ours
map one to one, but that blocks are stacked (leading "layers" axis) and heads have an axis of their own.
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
from dynaip_jax.layers.attention import attention
from dynaip_jax.layers.basic import LECUN, SMALL, LayerNorm, linear, parameter, scanned
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.hf import config_from_hf

SIDES = (1, 1 << 14)  # of a picture in pixels
CUBIC = -0.75  # of the bicubic kernel by which torch resizes


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """Sizes, in transformers' field names. Positions are learned for squares of `image_size` pixels, cut in squares of `patch_size`;
    those of another size are interpolated. `layer_scale`: whether blocks weigh what they add (DINOv2). Raises `ValueError` for sizes that
    do not fit."""

    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-12
    layer_scale: bool = False

    def __post_init__(self) -> None:
        ranges = dict(num_hidden_layers=schema.BLOCKS, layer_norm_eps=schema.EPSILON, image_size=SIDES)
        schema.check(self, **ranges)
        if self.hidden_size % self.num_attention_heads:
            heads = f"num_attention_heads {self.num_attention_heads}"
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {heads}")
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")
        block = self.hidden_size * (4 * self.hidden_size + 2 * self.intermediate_size)
        schema.check_total(self.num_hidden_layers * block)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> int:
        """Patches a side that positions are learned for."""
        return self.image_size // self.patch_size

    @property
    def name(self) -> str:
        """What a report calls it, such as "DINO ViT-S/16"."""
        size = {192: "T", 384: "S", 768: "B", 1024: "L", 1536: "g"}.get(self.hidden_size, str(self.hidden_size))
        return f"DINO{'v2' if self.layer_scale else ''} ViT-{size}/{self.patch_size}"

    @classmethod
    def tiny(cls, **changes: Any) -> DinoConfig:
        """For tests: 32 wide, 2 blocks, 17 tokens of a 32-pixel picture."""
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        return cls(**{**sizes, "image_size": 32, "patch_size": 8, **changes})

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> DinoConfig:
        """The config in the dictionary of a transformers `config.json` of `ViTModel` or `Dinov2Model`. Raises `UserError` for another kind of
        model and for sizes that do not fit."""
        second = hf.get("model_type") == "dinov2"
        supported = dict(
            model_type=("vit", "dinov2"), hidden_act=("gelu",), num_channels=(3,), qkv_bias=(True,), use_swiglu_ffn=(False,)
        )  # fmt: skip
        usual: dict[str, Any] = dict(hidden_size=768, num_attention_heads=12, patch_size=14 if second else 16)  # theirs
        given, changes = {**usual, **hf}, dict[str, Any](layer_scale=second)
        if second:
            ratio = schema.typed(float, given.get("mlp_ratio", 4), "mlp_ratio")
            width = schema.typed(int, given["hidden_size"], "hidden_size")
            changes |= dict(intermediate_size=int(width * ratio))
            given = dict(layer_norm_eps=1e-6) | given
        else:
            given = dict(intermediate_size=3072) | given
        return config_from_hf(cls, given, supported, changes)


class Dino(nn.Module):
    """Pictures `pixel_values` `[b, H, W, 3]`, normalised, channels last, sides multiples of the patch -> the normed last states, in
    `compute.dtype`: of the class token `[b, c]`, and of the patches `[b, rows, columns, c]`. Raises `ValueError` for other sides."""

    config: DinoConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> tuple[jax.Array, jax.Array]:
        c, p = self.config, self.compute
        b, height, width, _ = pixel_values.shape
        if height % c.patch_size or width % c.patch_size:
            raise ValueError(f"pictures of {width} x {height} pixels: expected multiples of {c.patch_size}")
        size = (c.patch_size, c.patch_size)
        init = nn.with_logical_partitioning(LECUN, (None, None, "channels", "embed"))
        cut = nn.Conv(
            c.hidden_size, size, strides=size, padding="VALID", kernel_init=init, name="patch_embedding", **p.dtypes
        )
        patches = cut(pixel_values)
        grid = height // c.patch_size, width // c.patch_size
        token = parameter(self, "class_embedding", SMALL, ("embed",), (c.hidden_size,), p.param_dtype)
        table = parameter(
            self, "position_embedding", SMALL, (None, "embed"), (1 + c.grid**2, c.hidden_size), p.param_dtype
        )
        x = patches.reshape(b, -1, c.hidden_size)
        x = jnp.concatenate([jnp.broadcast_to(token.astype(p.dtype), (b, 1, c.hidden_size)), x], axis=1)
        x = x + positions(table, c.grid, grid).astype(p.dtype)
        x, _ = scanned(Block, c.num_hidden_layers, remat=p.remat)(c, p, name="blocks")(x)
        x = LayerNorm(eps=c.layer_norm_eps, param_dtype=p.param_dtype, name="norm")(x)
        return x[:, 0], x[:, 1:].reshape(b, *grid, c.hidden_size)

    @staticmethod
    def inputs_spec(config: DinoConfig, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the arguments of `__call__`, by name."""
        side = config.grid * config.patch_size
        return dict(pixel_values=jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32))


class Block(nn.Module):
    """Self-attention, then the MLP, each on the normed stream `x` `[b, n, c]`."""

    config: DinoConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        c, p = self.config, self.compute
        h = self._norm("norm1")(x)
        heads, axes = (c.num_attention_heads, c.head_dim), ("embed", "heads", "head_dim")
        q, k, v = (linear(heads, axes, name=name, **p.dtypes)(h) for name in ("query", "key", "value"))
        out = linear(c.hidden_size, ("heads", "head_dim", "embed"), name="out", axis=(-2, -1), **p.dtypes)
        x = x + self._scaled("scale1", out(attention(q, k, v, kernel=p.attention)))
        h = linear(c.intermediate_size, ("embed", "mlp"), name="fc1", **p.dtypes)(self._norm("norm2")(x))
        h = linear(c.hidden_size, ("mlp", "embed"), name="fc2", **p.dtypes)(nn.gelu(h, approximate=False))
        return x + self._scaled("scale2", h), None

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(eps=self.config.layer_norm_eps, param_dtype=self.compute.param_dtype, name=name)

    def _scaled(self, name: str, x: jax.Array) -> jax.Array:
        if not self.config.layer_scale:
            return x
        shape, dtype = (self.config.hidden_size,), self.compute.param_dtype
        return x * parameter(self, name, nn.initializers.ones, ("embed",), shape, dtype).astype(x.dtype)


def positions(table: jax.Array, learned: int, grid: tuple[int, int]) -> jax.Array:
    """Positions `[1 + rows * columns, c]` of a class token and a grid of patches, from a `table` `[1 + learned^2, c]`; another grid is
    interpolated bicubically, in float32, as torch does."""
    if grid == (learned, learned):
        return table
    square = table[1:].astype(jnp.float32).reshape(learned, learned, -1)
    rows, columns = (jnp.asarray(resizing(learned, n)) for n in grid)
    made = jnp.einsum("yi,xj,ijc->yxc", rows, columns, square, precision="highest")
    return jnp.concatenate([table[:1].astype(jnp.float32), made.reshape(-1, table.shape[-1])])


def resizing(source: int, target: int) -> np.ndarray:
    """The matrix `[target, source]` of a bicubic interpolation along one side, edges repeated. Source: Keys 1981, with torch's
    constant, pixel centres aligned."""
    at = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(at).astype(int)
    weights = np.zeros((target, source), np.float32)
    for tap in range(-1, 3):
        x = np.abs(at - (first + tap))
        near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
        far = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
        np.add.at(weights, (np.arange(target), np.clip(first + tap, 0, source - 1)), np.where(x <= 1, near, far))
    return weights
