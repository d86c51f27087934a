"""Stage `judge`: the network that measures pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from dynaip_jax.shapeland import default
from dynaip_jax.shapeland.cases import truth
from dynaip_jax.shapeland.judge import FINE, Judge, colour_errors, init_judge
from dynaip_jax.shapeland.world import CLASSES, SIZE, Scene, generator, render, sample_identity, sample_scene
from dynaip_jax.storage.manifest import flatten
from dynaip_jax.storage.tensors import read_tree
from train.shapeland.fit import choose, fit
from train.shapeland.losses import contrastive, cross_entropy, unit
from train.shapeland.processes import in_processes
from train.shapeland.workdir import save_weights

POOL = 8000  # identities
STEPS = 1600
MORE = 800  # steps of a judge that is not fresh
RATE = 2e-3
BATCH = 64  # identities, each with two views
EMPTY = BATCH // 2  # empty scenes in a batch
NUMBERS = (0.3, 0.25, 0.25, 0.2)  # shares of close views and of scenes with 1, 2 and 3 subjects
NOISE = 0.03
IDENTITY_SCALE = 10.0  # of cosines in the contrastive loss
# Weights of losses: which classes are there, where parts are read, colours, and pattern and emblem each.
PRESENCE, LOOK, COLOUR, PART = 8, 2, 20, 2


def train_judge(folder: Path, seed: int, fresh: bool = True) -> None:
    """Attributes by cross-entropy, identity by telling the same subject from others of its class.

    `fresh`: from random weights; otherwise the package's judge is trained further.
    """
    pool = in_processes(partial(_views, seed), POOL)
    pictures = np.stack([[image for image, _ in views] for views in pool])
    labels = jax.tree.map(
        lambda *x: np.stack(x).reshape(len(pool), 3, *x[0].shape), *[label for views in pool for _, label in views]
    )

    def batch_of(step: int) -> tuple[np.ndarray, Any]:
        rows = choose(seed, step, len(pictures), BATCH)
        parts = [(rows, 0), (rows, 1), (rows[:EMPTY], 2)]
        pick = lambda x: np.concatenate([x[r, view] for r, view in parts])
        return pick(pictures), jax.tree.map(pick, labels)

    params = init_judge(jax.random.key(seed))
    if not fresh:
        params = started_from(params, read_tree(default.JUDGE))
    params = fit(folder / "run", params, _loss, batch_of, STEPS if fresh else MORE, RATE, seed)
    save_weights(folder, params)


def _views(seed: int, n: int) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Two pictures of one subject, each in a scene of its own, and an empty scene; each with its labels."""
    rng = generator(seed, "judge", n)
    kind, identity = str(rng.choice(CLASSES)), sample_identity(rng)
    views = []
    for _ in range(2):
        count = int(rng.choice(4, p=NUMBERS))  # 0: a close view
        others = [str(k) for k in rng.permutation([k for k in CLASSES if k != kind])[: max(count - 1, 0)]]
        subjects = [(kind, identity), *((k, sample_identity(rng)) for k in others)]
        scene = sample_scene(rng, subjects=subjects, large=not count)
        views.append(_labelled(scene, CLASSES.index(kind)))
    return [*views, _labelled(sample_scene(rng, 0), -1)]


def _labelled(scene: Scene, subject: int) -> tuple[np.ndarray, dict[str, Any]]:
    picture = render(scene)
    return picture.image, _labels(scene, picture.masks, subject)


def started_from(params: Any, stored: Any) -> Any:
    """`params` with what is `stored` of the same name and shape."""
    found = flatten(stored)
    fits = lambda k, x: k in found and found[k].shape == x.shape
    return unflatten_dict({k: found[k] if fits(k, x) else x for k, x in flatten(params).items()}, sep=".")


def _labels(scene: Scene, masks: np.ndarray, subject: int) -> dict[str, Any]:
    labels = {name: x[0] for name, x in truth([scene])._asdict().items()}
    kinds = [CLASSES.index(s.kind) for s in scene.subjects]
    return labels | dict(subject=np.int32(subject), owner=owners(masks, kinds))


def owners(masks: np.ndarray, kinds: Sequence[int]) -> np.ndarray:
    """The class that has more than half of each cell of the fine grid, -1 if there is none: int8 `[f]`. `masks` `[s, H, W]`, `kinds`: their
    classes."""
    side = SIZE // FINE
    share = masks.reshape(len(masks), FINE, side, FINE, side).mean((2, 4)).reshape(len(masks), FINE**2)
    owner = np.full(FINE**2, -1, np.int8)
    for kind, cells in zip(kinds, share, strict=True):
        owner[cells > 0.5] = kind
    return owner


def _loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """On a batch of n first views, n second views and n / 2 empty scenes."""
    pictures, label = batch
    v: Any = Judge().apply({"params": params}, _disturbed(unit(pictures), key))  # a Verdict
    drawn = label["position"] >= 0
    present = jnp.logaddexp(0, jnp.where(drawn, -v.present, v.present)).mean()

    def of_drawn(each: jax.Array) -> jax.Array:
        return (each * drawn).sum() / drawn.sum()

    def named(logits: jax.Array, name: str) -> jax.Array:
        return of_drawn(cross_entropy(logits, jnp.maximum(label[name], 0)))

    def right(logits: jax.Array, name: str) -> jax.Array:
        return of_drawn(logits.argmax(-1) == label[name])

    scene = sum(cross_entropy(getattr(v, name), label[name]).mean() for name in ("background", "light", "number"))
    off = colour_errors(v.colours, label["colours"])
    parts = PART * (named(v.pattern, "pattern") + named(v.emblem, "emblem")) + COLOUR * of_drawn(off)
    n = len(pictures) * 2 // 5
    kinds = label["subject"][:n]
    first, second = (v.identity[jnp.arange(n) + start, kinds] for start in (0, n))
    logits = jnp.where(kinds[:, None] == kinds[None], first @ second.T * IDENTITY_SCALE, -1e9)
    figures = dict(
        present=((v.present > 0) == drawn).all(-1).mean(),
        place=right(v.position, "position"),
        ground=(v.background.argmax(-1) == label["background"]).mean(),
        light=(v.light.argmax(-1) == label["light"]).mean(),
        number=(v.number.argmax(-1) == label["number"]).mean(),
        same=(logits.argmax(-1) == jnp.arange(n)).mean(),
        colour=of_drawn(off),
        pattern=right(v.pattern, "pattern"),
        emblem=right(v.emblem, "emblem"),
    )
    cost = PRESENCE * present + named(v.position, "position") + scene + contrastive(logits)
    return cost + parts + LOOK * _astray(v.look, label["owner"]), figures


def _astray(look: jax.Array, owner: jax.Array) -> jax.Array:
    """How little attention, by its logits `[b, f, k]`, lies evenly on a class's own cells: its cross-entropy, mean of the classes drawn.
    `owner` `[b, f]`: classes of cells."""
    own = jax.nn.one_hot(owner, look.shape[-1])
    count = own.sum(axis=1)
    missed = -(own * jax.nn.log_softmax(look, axis=1)).sum(axis=1) / jnp.maximum(count, 1)
    return missed.sum() / jnp.maximum((count > 0).sum(), 1)


def _disturbed(x: jax.Array, key: jax.Array) -> jax.Array:
    """Pictures `[b, H, W, 3]`, each blurred by a random share and with noise."""
    blur_key, noise_key = jax.random.split(key)
    soft = (x + sum(jnp.roll(x, shift, axis) for axis in (1, 2) for shift in (-1, 1))) / 5
    x = x + jax.random.uniform(blur_key, (len(x), 1, 1, 1)) * (soft - x)
    return x + NOISE * jax.random.normal(noise_key, x.shape)
