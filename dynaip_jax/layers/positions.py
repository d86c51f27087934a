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


@jax.custom_vjp
def apply_rope(x: Float[Tensor, "b n h d"], rope: tuple[jax.Array, jax.Array]) -> Float[jax.Array, "b n h d"]:
    """Rotates adjacent pairs of the last axis of `x` `[b, n, h, d]` in float32; `rope` as from `rope_table`, `[b, n, d/2]`, which
    has no gradient."""
    cos, sin = (r[..., None, :] for r in rope)
    return jax.lax.platform_dependent(x, cos, sin, tpu=_by_product, default=_by_pairs)


def _rotated(x: jax.Array, rope: Rope) -> tuple[jax.Array, Rope]:
    return apply_rope(x, rope), rope


def _turned_back(rope: Rope, gradient: jax.Array) -> tuple[jax.Array, None]:
    cos, sin = rope
    return apply_rope(gradient, (cos, -sin)), None


apply_rope.defvjp(_rotated, _turned_back)


def _by_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def _by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The other of each pair, with its sign, comes of a product with a constant matrix in `x`'s own dtype: exact, as each of its sums has
    one term. Of an axis two long, which pairs make, a TPU writes float32 copies to memory."""
    size = x.shape[-1]
    swap = np.kron(np.eye(size // 2), [[0, 1], [-1, 0]]).astype(x.dtype)  # x @ swap is (-x1, x0, -x3, x2, ..)
    other = jnp.matmul(x, swap, precision=jax.lax.Precision.HIGHEST)
    cos, sin = (jnp.repeat(r, 2, axis=-1) for r in (cos, sin))
    return (x.astype(jnp.float32) * cos + other.astype(jnp.float32) * sin).astype(x.dtype)
