"""Where each subject belongs in the picture, found from the attention of image rows to the words that name it.

Training-free; our reconstruction (docs/method.md, "Injection").
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from dynaip_jax.layers.attention import attention
from dynaip_jax.types import Tensor


class RegionScores(NamedTuple):
    """Where subjects belong by the blocks so far: the sum of their `word_scores`, `[b, s, i]`, and their number."""

    scores: jax.Array
    blocks: jax.Array


def smoothing_matrix(ids: Float[Tensor, "b i axes"], sigma: float = 1.0) -> Float32[jax.Array, "b i i"]:
    """Gaussian weights of the distance between positions `ids` `[b, i, 3]`, float32 `[b, i, i]`, rows sum to 1.

    As large as the logits of one attention head: one for all blocks, and no need to know the grid's shape.
    """
    distance = jnp.sum((ids[:, :, None] - ids[:, None]) ** 2, axis=-1)
    return jax.nn.softmax(-0.5 * distance.astype(jnp.float32) / sigma**2, axis=-1)


def word_scores(
    q: Float[Tensor, "b i h d"],
    k: Float[Tensor, "b t h d"],
    words: Float[Tensor, "words s t"],
    smoothing: Float[Tensor, "ids i i"],
    kernel: str = "auto",
) -> Float32[jax.Array, "b s i"]:
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


def auto_region(scores: Float[Tensor, "b s i"], sharpness: float) -> Float[jax.Array, "b s i"]:
    """Where each subject belongs, float32 `[b, s, i]`, rows sum over s to 1: exp(scores)^sharpness / sum over subjects.

    `scores` `[b, s, i]`: `word_scores` of a block, or their mean over several. Training-free; our reconstruction
    (docs/method.md, "Injection").
    """
    return jax.nn.softmax(sharpness * scores, axis=1)
