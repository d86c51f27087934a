"""The structures that cross module borders, and the axis letters used in every einsum and docstring.

b batch · s subject · i image tokens · t text tokens · n any row tokens · m reference tokens of one subject ·
l block · h heads · d head size · c model width
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Tensor = jax.Array | np.ndarray  # in shape annotations: `Float[Tensor, "b n h d"]`


class Sites(NamedTuple):
    """Where a backbone can read an image prompt: how many dual-stream (`double`) and single-stream (`single`) blocks, their heads and
    head size, and the model width."""

    double: int
    single: int
    heads: int
    head_dim: int
    width: int


class References(NamedTuple):
    """Reference pictures that a backbone reads by itself: `tokens` `[b or 1, r, c]` of clean latents, one picture after the other, and
    their positions `ids` `[1, r, axes]`."""

    tokens: jax.Array
    ids: jax.Array


class TextCondition(NamedTuple):
    """What a prompt tells the backbone: `states` `[b, t, c]`, a row a token, and `pooled` `[b, c]` (None where it takes none); and the
    pictures that a backbone reads with it, if any."""

    states: jax.Array
    pooled: jax.Array | None
    references: References | None = None


class KV(NamedTuple):
    """Keys and values that rows attend to: `k`, `v` `[l, b, s, m, h, d]` for a bank, without `l` inside a block."""

    k: jax.Array
    v: jax.Array


class ImagePrompt(NamedTuple):
    """What a backbone needs to know of the reference images; it knows nothing of CLIP, HMoE or DynaIP.

    `l` counts the injected blocks: the double blocks first, then (if `single` is given) the single ones.
    The batch axis may be 1 where all rows of the batch share one image prompt.
    """

    double: KV  # k, v: [l_double, b, s, m, h, d]
    single: KV | None  # the same for single-stream blocks, or None
    image_gain: jax.Array  # [l, b, s]
    text_gain: jax.Array  # [l, b, s]; zeros = DDS
    region: jax.Array | None  # [b, s, i], sums over s to at most 1; None = 1 everywhere, or as `words` has it
    words: jax.Array | None = None  # [b, s, t], each subject's own text rows, sums over t to 1: blocks find the regions

    def scaled(self, factor) -> ImagePrompt:
        """The same image prompt with both gains multiplied by `factor` (broadcast against `[l, b, s]`)."""
        return self._replace(image_gain=self.image_gain * factor, text_gain=self.text_gain * factor)

    def tiled(self, times: int) -> ImagePrompt:
        """For a batch that repeats its rows `times` times, one whole batch after the other; a shared prompt stays as it is."""

        def along(axis: int, part):
            return jax.tree.map(lambda x: x if x.shape[axis] == 1 else jnp.concatenate([x] * times, axis), part)

        own = {name: along(0, getattr(self, name)) for name in ("region", "words")}
        return ImagePrompt(*(along(1, part) for part in self[:4]), **own)
