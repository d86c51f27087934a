"""The judge of Shapeland: reads classes, columns, background, number and identity off a picture.

A small convolutional network, trained on ground-truth renders of identities of its own (`train.shapeland.judge`). It shares
nothing with the models that it judges. Axis letters: b batch, g grid cells, k classes, c channels, d identity size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dynaip_jax.errors import UserError
from dynaip_jax.layers.basic import LayerNorm
from dynaip_jax.shapeland.world import BACKGROUNDS, CLASSES, POSITIONS, SIZE
from dynaip_jax.storage.manifest import flatten
from dynaip_jax.storage.tensors import read_tree

WIDTHS = (32, 64, 128)
IDENTITY = 32
COUNTS = 4  # 0 to 3 subjects


class Verdict(NamedTuple):
    """Logits, except `identity`: an embedding of unit length for each class, which means nothing for a class not in the picture."""

    present: jax.Array  # [b, k]
    position: jax.Array  # [b, k, 3]
    background: jax.Array  # [b, 6]
    number: jax.Array  # [b, 4], of subjects
    identity: jax.Array  # [b, k, d]


class Judge(nn.Module):
    """Pictures `[b, H, W, 3]` in [-1, 1] -> `Verdict`. Each class has its own attention over the grid."""

    @nn.compact
    def __call__(self, images: jax.Array) -> Verdict:
        x = images
        for n, width in enumerate(WIDTHS):
            x = nn.Conv(width, (3, 3), strides=(2, 2), name=f"down_{n}")(x)
            for m in range(n):  # none at the finest level, which would cost most
                h = nn.Conv(width, (3, 3), name=f"conv_{n}_{m}")(nn.relu(LayerNorm(name=f"norm_{n}_{m}")(x)))
                x = x + nn.Conv(width, (3, 3), name=f"out_{n}_{m}")(nn.relu(h))
        b, width = x.shape[0], x.shape[-1]
        x = x.reshape(b, -1, width)
        places = self.param("places", nn.initializers.normal(0.1), (x.shape[1], width))
        x = nn.relu(LayerNorm(name="last_norm")(x + places))

        looks = jax.nn.softmax(nn.Dense(len(CLASSES), name="look")(x), axis=1)
        seen = jnp.einsum("bgk,bgc->bkc", looks, x)
        per_class = self.param("class_kernel", nn.initializers.lecun_normal(), (len(CLASSES), width))
        bias = self.param("class_bias", nn.initializers.zeros, (len(CLASSES),))
        whole = nn.relu(nn.Dense(width, name="whole")(jnp.concatenate([x.mean(axis=1), x.max(axis=1)], -1)))
        identity = nn.Dense(IDENTITY, name="identity")(nn.relu(nn.Dense(width, name="identity_in")(seen)))
        return Verdict(
            present=jnp.einsum("bkc,kc->bk", seen, per_class) + bias,
            position=nn.Dense(len(POSITIONS), name="position")(seen),
            background=nn.Dense(len(BACKGROUNDS), name="background")(whole),
            number=nn.Dense(COUNTS, name="number")(jnp.concatenate([seen.reshape(b, -1), whole], -1)),
            identity=identity * jax.lax.rsqrt(jnp.sum(identity**2, -1, keepdims=True) + 1e-6),
        )


def init_judge(key: jax.Array) -> Any:
    """Random parameters."""
    return nn.meta.unbox(Judge().init(key, jnp.zeros((1, SIZE, SIZE, 3)))["params"])


def read_judge(path: str | Path) -> Any:
    """The parameters in a file. Raises `UserError` for a file that cannot be read or is not a judge's."""
    tree = read_tree(path)
    shapes, expected = (
        {k: x.shape for k, x in flatten(t).items()} for t in (tree, jax.eval_shape(init_judge, jax.random.key(0)))
    )
    if wrong := sorted(k for k in {*shapes, *expected} if shapes.get(k) != expected.get(k)):
        name = wrong[0]
        raise UserError(
            f"{path}: not a judge: {name}: found {shapes.get(name)}, expected {expected.get(name)}; use another file"
        )
    return tree


@jax.jit
def judge(params: Any, images: jax.Array) -> Verdict:
    """The verdict on uint8 pictures `[b, H, W, 3]`."""
    model: Any = Judge()
    return model.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1)
