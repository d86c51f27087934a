"""What the losses of Shapeland's small networks share. Axis letters: b batch, k classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def unit(pictures: ArrayLike) -> jax.Array:
    """uint8 -> float32 in [-1, 1]."""
    return jnp.asarray(pictures, jnp.float32) / 127.5 - 1


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Negative log-likelihood `[...]` of labels `[...]` under logits `[..., k]`."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]


def contrastive(logits: jax.Array) -> jax.Array:
    """Symmetric InfoNCE of similarities `[b, b]`, where item i of the rows belongs to item i of the columns."""
    return -0.5 * (jnp.diag(jax.nn.log_softmax(logits, 0)) + jnp.diag(jax.nn.log_softmax(logits, 1))).mean()
