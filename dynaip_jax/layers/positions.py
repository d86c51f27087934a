"""Where rows stand in time and in the picture: sinusoidal embeddings, rotary positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from dynaip_jax.types import Tensor

Rope = tuple[Float32[jax.Array, "b n half"], Float32[jax.Array, "b n half"]]


def timestep_embedding(t: Float[Tensor, " b"], dim: int, max_period: float = 10_000.0) -> Float32[jax.Array, "b {dim}"]:
    """Sinusoidal embedding, float32 `[b, dim]` of `t` `[b]` in [0, 1] (or a guidance scale): cos then sin of 1000 t.

    Source: FLUX `timestep_embedding` (time factor 1000). Stays in float32 whatever the compute dtype: in bfloat16 a
    guidance of 3.5 would become 3504.
    """
    half = dim // 2
    freqs = np.exp(-np.log(max_period) * np.arange(half, dtype=np.float64) / half).astype(np.float32)
    args = 1000.0 * t.astype(jnp.float32)[:, None] * freqs
    return jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=-1)


def rope_table(ids: Float[Tensor, "b n axes"], axes_dim: tuple[int, ...], theta: float) -> Rope:
    """Cosine and sine, each float32 `[b, n, sum(axes_dim) / 2]`, of positions `ids` `[b, n, len(axes_dim)]`.

    Frequencies are computed in float64 at trace time.
    """
    angles = []
    for a, dim in enumerate(axes_dim):
        omega = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles.append(ids[..., a, None].astype(jnp.float32) * omega.astype(np.float32))
    angle = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Float[Tensor, "b n h d"], rope: tuple[jax.Array, jax.Array]) -> Float[jax.Array, "b n h d"]:
    """Rotates adjacent pairs of the last axis of `x` `[b, n, h, d]` in float32; `rope` as from `rope_table`, `[b, n, d/2]`."""
    cos, sin = (r[..., None, :] for r in rope)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
