"""The judge of Shapeland: reads classes, columns, background, light, number, identity and its parts off a picture.

A small convolutional network, trained on ground-truth renders of identities of its own (`train.shapeland.judge`). It shares
nothing with the models that it judges. Axis letters: b batch, g cells of the coarse grid, f of the fine one, k classes, c channels,
d identity size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dynaip_jax.errors import UserError
from dynaip_jax.layers.basic import LayerNorm
from dynaip_jax.shapeland.world import BACKGROUNDS, CLASSES, EMBLEMS, LIGHTS, PATTERNS, POSITIONS, SIZE
from dynaip_jax.storage.manifest import flatten
from dynaip_jax.storage.tensors import read_tree

WIDTHS = (32, 64, 128)
IDENTITY = 32
COUNTS = 4  # 0 to 3 subjects
FINE = SIZE // 4  # cells a side of the grid on which parts of identities are read


class Verdict(NamedTuple):
    """Logits, except `identity`, an embedding of unit length for each class, and `colours`, the two colours of each in [0, 1], in either
    order. What is said of a class means nothing if it is not in the picture."""

    present: jax.Array  # [b, k]
    position: jax.Array  # [b, k, 3]
    background: jax.Array  # [b, 6]
    light: jax.Array  # [b, 3]
    number: jax.Array  # [b, 4], of subjects
    identity: jax.Array  # [b, k, d]
    colours: jax.Array  # [b, k, 2, 3]
    pattern: jax.Array  # [b, k, 4]
    emblem: jax.Array  # [b, k, 4]
    look: jax.Array  # [b, f, k], logits of where parts are read


class Judge(nn.Module):
    """Pictures `[b, H, W, 3]` in [-1, 1] -> `Verdict`. Each class has its own attention over the grids."""

    @nn.compact
    def __call__(self, images: jax.Array) -> Verdict:
        x, scales = images, []
        for n, width in enumerate(WIDTHS):
            x = nn.Conv(width, (3, 3), strides=(2, 2), name=f"down_{n}")(x)
            for m in range(n):  # none at the finest level, which would cost most
                h = nn.Conv(width, (3, 3), name=f"conv_{n}_{m}")(nn.relu(LayerNorm(name=f"norm_{n}_{m}")(x)))
                x = x + nn.Conv(width, (3, 3), name=f"out_{n}_{m}")(nn.relu(h))
            scales.append(x)
        b, width = x.shape[0], x.shape[-1]
        x = x.reshape(b, -1, width)
        places = self.param("places", nn.initializers.normal(0.1), (x.shape[1], width))
        x = nn.relu(LayerNorm(name="last_norm")(x + places))

        look = nn.Dense(len(CLASSES), name="look")(x)
        seen = jnp.einsum("bgk,bgc->bkc", jax.nn.softmax(look, axis=1), x)
        per_class = self.param("class_kernel", nn.initializers.lecun_normal(), (len(CLASSES), width))
        bias = self.param("class_bias", nn.initializers.zeros, (len(CLASSES),))
        whole = nn.relu(nn.Dense(width, name="whole")(jnp.concatenate([x.mean(axis=1), x.max(axis=1)], -1)))
        identity = nn.Dense(IDENTITY, name="identity")(nn.relu(nn.Dense(width, name="identity_in")(seen)))
        return Verdict(
            present=jnp.einsum("bkc,kc->bk", seen, per_class) + bias,
            position=nn.Dense(len(POSITIONS), name="position")(seen),
            background=nn.Dense(len(BACKGROUNDS), name="background")(whole),
            light=nn.Dense(len(LIGHTS), name="light")(whole),
            number=nn.Dense(COUNTS, name="number")(jnp.concatenate([seen.reshape(b, -1), whole], -1)),
            identity=identity * jax.lax.rsqrt(jnp.sum(identity**2, -1, keepdims=True) + 1e-6),
            **Parts(name="parts")(images, scales[1], x, look),
        )


class Parts(nn.Module):
    """Colours, pattern and emblem of each class: what its cells of the fine grid hold, and how their colours vary."""

    @nn.compact
    def __call__(self, images: jax.Array, fine: jax.Array, coarse: jax.Array, look: jax.Array) -> dict[str, jax.Array]:
        """`images` `[b, H, W, 3]`, features `fine` `[b, FINE, FINE, c]` and `coarse` `[b, g, c]`, attention's logits `look` `[b, g, k]`."""
        b, width = coarse.shape[0], coarse.shape[-1]
        x = jnp.concatenate([nn.relu(LayerNorm(name="norm")(fine)), _enlarged(coarse)], -1).reshape(b, FINE**2, -1)
        x = nn.relu(nn.Dense(width, name="inner")(x))
        look = nn.Dense(len(CLASSES), name="look")(x) + _enlarged(look).reshape(b, FINE**2, -1)
        weights = jax.nn.softmax(look, axis=1)

        side = SIZE // FINE
        pixels = (
            images.reshape(b, FINE, side, FINE, side, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, FINE**2, side**2, 3)
        )
        mean = jnp.einsum("bfk,bfpc->bkc", weights, pixels) / side**2
        products = jnp.einsum("bfk,bfpc,bfpd->bkcd", weights, pixels, pixels) / side**2
        spread = (products - mean[..., :, None] * mean[..., None, :]).reshape(*mean.shape[:2], 9)
        held = jnp.concatenate([jnp.einsum("bfk,bfc->bkc", weights, x), mean, spread], -1)
        h = nn.relu(nn.Dense(2 * width, name="held_0")(held))
        h = nn.relu(nn.Dense(width, name="held_1")(h))
        colours = nn.sigmoid(nn.Dense(6, name="colours")(h))
        return dict(
            colours=colours.reshape(*colours.shape[:2], 2, 3),
            pattern=nn.Dense(len(PATTERNS), name="pattern")(h),
            emblem=nn.Dense(len(EMBLEMS), name="emblem")(h),
            look=look,
        )


def _enlarged(x: jax.Array) -> jax.Array:
    """Cells `[b, g, c]` of a square grid -> `[b, FINE, FINE, c]`, each repeated."""
    side = round(x.shape[1] ** 0.5)
    times = FINE // side
    return x.reshape(x.shape[0], side, side, -1).repeat(times, 1).repeat(times, 2)


def colour_errors(found: ArrayLike, asked: ArrayLike) -> jax.Array:
    """Mean absolute difference of two pairs of colours `[..., 2, 3]`, in the order in which it is less: `[...]`."""
    found, asked = jnp.asarray(found), jnp.asarray(asked)
    return jnp.minimum(*(jnp.abs(found - pair).mean((-2, -1)) for pair in (asked, asked[..., ::-1, :])))


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
