"""A cheap look at latents on their way: colours as a linear function of each latent pixel, fitted to the model's own autoencoder."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dynaip_jax import images
from dynaip_jax.families.base import Family
from dynaip_jax.runtime.programs import Quick

PICTURES, SIDE = 16, 16  # drawn to fit colours to: how many, and tokens a side
RIDGE = 1e-3


class Preview(NamedTuple):
    """Colours `[h, w, 3]` of latents `[c, h, w]`: `matrix` `[c, 3]` and `offset` `[3]`, for colours in [-1, 1]."""

    matrix: np.ndarray
    offset: np.ndarray

    @classmethod
    def fit(cls, family: Family, vae: Any) -> Preview:
        """Least squares over drawn pictures, whose latents the autoencoder with parameters `vae` says."""
        pictures = patterns(PICTURES, SIDE * family.multiple)
        latents = np.moveaxis(np.asarray(_latents(family, vae, jnp.asarray(pictures))), 1, -1)
        h, w, c = latents.shape[1:]
        block = pictures.shape[1] // h
        colours = pictures.reshape(len(pictures), h, block, w, block, 3).mean(axis=(2, 4)).reshape(-1, 3)
        inputs = latents.reshape(-1, c).astype(np.float64)
        mean, goal = inputs.mean(axis=0), colours.mean(axis=0)
        centred = inputs - mean
        normal = centred.T @ centred + RIDGE * len(inputs) * np.eye(c)
        matrix = np.linalg.solve(normal, centred.T @ (colours - goal))
        return cls(matrix.astype(np.float32), (goal - mean @ matrix).astype(np.float32))

    def __call__(self, latents: np.ndarray, height: int, width: int) -> Image.Image:
        """The picture of latents `[c, h, w]`, blurred up to `height` x `width` pixels."""
        colours = images.to_uint8(np.einsum("chw,cr->hwr", latents, self.matrix) + self.offset)
        return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


@partial(Quick, static_argnums=0)
def _latents(family: Family, vae: Any, pictures: jax.Array) -> jax.Array:
    return family.latents(family.encode(vae, pictures))


def patterns(count: int, size: int) -> np.ndarray:
    """Pictures float32 `[count, size, size, 3]` in [-1, 1]: soft clouds of colour with boxes of one colour on them."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        cells = int(rng.integers(2, 7))
        cloud = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture = np.array(cloud.resize((size, size), Image.Resampling.BICUBIC), np.float32)
        for _ in range(4):
            top, left, bottom, right = rng.integers(0, size, 4)
            area = np.s_[min(top, bottom) : max(top, bottom), min(left, right) : max(left, right)]
            picture[area] = rng.integers(0, 256, 3)
        found.append(picture / 127.5 - 1)
    return np.stack(found).astype(np.float32)
