"""What multimodal diffusion transformers (MM-DiT) have in common: conditioning, modulation, and the two ends of joint attention.

Source: black-forest-labs/flux and flux2, `model.py`. Text rows come before image rows wherever the two are joined.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax

from dynaip_jax.layers.basic import DenseGeneral, LayerNorm, RMSNorm, linear
from dynaip_jax.layers.compute import Compute


class Modulation(NamedTuple):
    """Shift, scale and gate `[b, 1, c]` of one normed part of a block; the last layer has no gate."""

    shift: jax.Array
    scale: jax.Array
    gate: Any = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normed, scaled and shifted rows of `x` `[b, n, c]`."""
        return (1 + self.scale) * LayerNorm(affine=False)(x) + self.shift


class MLPEmbedder(nn.Module):
    """Linear -> SiLU -> Linear, from a vector to the model `width`."""

    width: int
    compute: Compute
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        how = dict(use_bias=self.use_bias, **self.compute.dtypes)
        x = linear(self.width, ("channels", "embed"), name="in_layer", **how)(x)
        return linear(self.width, ("channels", "embed"), name="out_layer", **how)(nn.silu(x))


class Modulate(nn.Module):
    """The conditioning vector `[b, c]` -> `parts` `Modulation`s of `vectors` vectors each."""

    width: int
    compute: Compute
    parts: int
    vectors: int = 3
    use_bias: bool = True

    @nn.compact
    def __call__(self, vec: jax.Array) -> list[Modulation]:
        shape, axes = (self.parts * self.vectors, self.width), ("embed", None, "mlp")
        out = linear(shape, axes, name="lin", use_bias=self.use_bias, **self.compute.dtypes)(nn.silu(vec))
        each = [out[:, None, n] for n in range(shape[0])]
        return [Modulation(*each[n : n + self.vectors]) for n in range(0, shape[0], self.vectors)]


class QKV(nn.Module):
    """Queries and keys, RMS-normed per head, and values, each `[b, n, h, d]`; `head` = (heads, head size)."""

    head: tuple[int, int]
    compute: Compute
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        p, axes = self.compute, ("embed", None, "heads", "head_dim")
        qkv = linear((3, *self.head), axes, name="qkv", use_bias=self.use_bias, **p.dtypes)(x)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        q = RMSNorm(param_dtype=p.param_dtype, name="query_norm")(q)
        k = RMSNorm(param_dtype=p.param_dtype, name="key_norm")(k)
        return q, k, v


def heads_out(width: int, compute: Compute, name: str, use_bias: bool = True) -> DenseGeneral:
    """The projection of attention heads `[b, n, h, d]` back to the model width."""
    axes = ("heads", "head_dim", "embed")
    return linear(width, axes, name=name, axis=(-2, -1), use_bias=use_bias, **compute.dtypes)


def split(x: jax.Array | None, text_rows: int) -> tuple[jax.Array | None, jax.Array | None]:
    """Text rows and the others of `[b, n, h, d]`."""
    return (None, None) if x is None else (x[:, :text_rows], x[:, text_rows:])
