"""Latents as tokens: squares of 2 x 2 latent pixels, channel-major, row by row."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Float, Float32


def pack_latents(z: Float[jax.Array, "b c h w"]) -> Float[jax.Array, "b i d"]:
    """Latents `[b, c, h, w]` -> tokens `[b, h/2 · w/2, 4c]`, channel-major: `b c (h 2) (w 2) -> b (h w) (c 2 2)`."""
    b, c, h, w = z.shape
    z = z.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    return z.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack_latents(x: Float[jax.Array, "b i d"], height: int, width: int) -> Float[jax.Array, "b c {height} {width}"]:
    """Tokens `[b, i, 4c]` -> latents `[b, c, height, width]` (sizes in latent pixels); inverse of `pack_latents`."""
    b, _, c = x.shape
    x = x.reshape(b, height // 2, width // 2, c // 4, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c // 4, height, width)


def image_ids(height: int, width: int) -> Float32[np.ndarray, "1 i 3"]:
    """Position ids `[1, i, 3]` = (0, row, column) of the packed grid for latents of `height` x `width`."""
    rows, cols = np.meshgrid(np.arange(height // 2), np.arange(width // 2), indexing="ij")
    return np.stack([np.zeros_like(rows), rows, cols], axis=-1).reshape(1, -1, 3).astype(np.float32)
