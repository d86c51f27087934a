"""Stateless maths of the backbone: embeddings, rotary positions, attention, patch packing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dynaip_jax.layers import kernels
from dynaip_jax.types import KV


def timestep_embedding(t: jax.Array, dim: int, max_period: float = 10_000.0) -> jax.Array:
    """Sinusoidal embedding, float32 `[b, dim]` of `t` `[b]` in [0, 1] (or a guidance scale): cos then sin of 1000 t.

    Source: FLUX `timestep_embedding` (time factor 1000). Stays in float32 whatever the compute dtype: in bfloat16 a
    guidance of 3.5 would become 3504.
    """
    half = dim // 2
    freqs = np.exp(-np.log(max_period) * np.arange(half, dtype=np.float64) / half).astype(np.float32)
    args = 1000.0 * t.astype(jnp.float32)[:, None] * freqs
    return jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=-1)


def rope_table(ids: jax.Array, axes_dim: tuple[int, ...], theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each float32 `[..., n, sum(axes_dim) / 2]`, of positions `ids` `[..., n, len(axes_dim)]`.

    Frequencies are computed in float64 at trace time.
    """
    angles = []
    for a, dim in enumerate(axes_dim):
        omega = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles.append(ids[..., a, None].astype(jnp.float32) * omega.astype(np.float32))
    angle = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates adjacent pairs of the last axis of `x` `[b, n, h, d]` in float32; `rope` as from `rope_table`, `[b, n, d/2]`."""
    cos, sin = (r[..., None, :] for r in rope)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Softmax attention: `q` `[b, n, h, d]`, `k`, `v` `[b, m, h, d]` -> `[b, n, h, d]`; the one door to every kernel.

    `bias` is added to the logits, `[1 or b, h or 1, n, m]`; `scale` defaults to 1/sqrt(d). The softmax runs in float32.
    `kernel`: a name of `kernels.KERNELS`. "auto" takes cuDNN's or Pallas' flash attention where one fits, on a CPU one head at a
    time, and XLA's products otherwise; a name forces it, and is a `UserError` where it does not fit.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = kernels.choose(kernel, q, k, v, bias)
    if name in kernels.PLATFORM:
        return getattr(kernels, name)(q, k, v, scale)
    return getattr(kernels, name)(q, k, v, scale, bias)


def reference_attention(q: jax.Array, kv: KV, gain: jax.Array, merge: str = "sum", kernel: str = "auto") -> jax.Array:
    """Sum over subjects of gain · softmax(q K_sᵀ/√d) V_s: `q` `[b, n, h, d]`, K and V `[b or 1, s, m, h, d]` -> `[b, n, h, d]`.

    `gain` `[b, n, s]` weighs each subject in each row. The softmax runs over the tokens `m` of one subject (`merge` "sum", with
    `kernel` as in `attention`), or over those of all subjects, which then compete for a row ("concat"; the gain is then applied
    to the weights). Source: docs/method.md, "Injection".
    """
    b, d = q.shape[0], q.shape[-1]
    k, v = (jnp.broadcast_to(x, (b, *x.shape[1:])).astype(q.dtype) for x in kv)
    if merge == "concat":
        logits = jnp.einsum("bnhd,bsmhd->bhnsm", q, k, preferred_element_type=jnp.float32) * d**-0.5
        weights = jax.nn.softmax(logits, axis=(-2, -1)) * gain[:, None, :, :, None]
        return jnp.einsum("bhnsm,bsmhd->bnhd", weights.astype(q.dtype), v)
    gain = gain.astype(q.dtype)
    terms = (attention(q, k[:, s], v[:, s], kernel=kernel) * gain[:, :, s, None, None] for s in range(k.shape[1]))
    return functools.reduce(jnp.add, terms)


def row_gain(gain: jax.Array, region: jax.Array | None, batch: int, rows: int) -> jax.Array:
    """`[batch, rows, s]` from one block's gain `[b or 1, s]` and the region `[b or 1, s, rows]` (None: 1 everywhere)."""
    per_row = gain[:, None, :] if region is None else gain[:, None, :] * jnp.moveaxis(region, 1, 2)
    return jnp.broadcast_to(per_row, (batch, rows, gain.shape[-1]))


def smoothing_matrix(ids: jax.Array, sigma: float = 1.0) -> jax.Array:
    """Gaussian weights of the distance between positions `ids` `[b, i, 3]`, float32 `[b, i, i]`, rows sum to 1.

    As large as the logits of one attention head: one for all blocks, and no need to know the grid's shape.
    """
    distance = jnp.sum((ids[:, :, None] - ids[:, None]) ** 2, axis=-1)
    return jax.nn.softmax(-0.5 * distance.astype(jnp.float32) / sigma**2, axis=-1)


def word_scores(q: jax.Array, k: jax.Array, words: jax.Array, smoothing: jax.Array, kernel: str = "auto") -> jax.Array:
    """How strongly image rows attend to each subject's words, in logarithms: float32 `[b, s, i]`.

    `q` `[b, i, h, d]` of the image rows and `k` `[b, t, h, d]` of the text rows, both after RoPE; `words` `[b or 1, s, t]`;
    `smoothing` `[b or 1, i, i]`. The attention over the text rows alone, averaged over heads, summed over a subject's words
    and smoothed over the picture.
    """
    b, t, h, _ = k.shape
    values = jnp.broadcast_to(jnp.moveaxis(words, 1, 2)[:, :, None], (b, t, h, words.shape[1])).astype(jnp.float32)
    score = attention(q, k, values, kernel=kernel).mean(axis=2)
    score = jnp.einsum("bij,bjs->bsi", jnp.broadcast_to(smoothing, (b, *smoothing.shape[1:])), score)
    return jnp.log(score + jnp.finfo(jnp.float32).tiny)


def auto_region(scores: jax.Array, sharpness: float) -> jax.Array:
    """Where each subject belongs, float32 `[b, s, i]`, rows sum over s to 1: exp(scores)^sharpness / sum over subjects.

    `scores` `[b, s, i]`: `word_scores` of a block, or their mean over several. Training-free; our reconstruction
    (docs/method.md, "Injection").
    """
    return jax.nn.softmax(sharpness * scores, axis=1)


def pack_latents(z: jax.Array) -> jax.Array:
    """Latents `[b, c, h, w]` -> tokens `[b, h/2 · w/2, 4c]`, channel-major: `b c (h 2) (w 2) -> b (h w) (c 2 2)`."""
    b, c, h, w = z.shape
    z = z.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    return z.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack_latents(x: jax.Array, height: int, width: int) -> jax.Array:
    """Tokens `[b, i, 4c]` -> latents `[b, c, height, width]` (sizes in latent pixels); inverse of `pack_latents`."""
    b, _, c = x.shape
    x = x.reshape(b, height // 2, width // 2, c // 4, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c // 4, height, width)


def image_ids(height: int, width: int) -> np.ndarray:
    """Position ids `[1, i, 3]` = (0, row, column) of the packed grid for latents of `height` x `width`."""
    rows, cols = np.meshgrid(np.arange(height // 2), np.arange(width // 2), indexing="ij")
    return np.stack([np.zeros_like(rows), rows, cols], axis=-1).reshape(1, -1, 3).astype(np.float32)
