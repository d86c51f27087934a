"""The cases that all rows are measured on: prompts, references and ground-truth renders of subjects that no model was trained on.

Axis letters: n cases, s subjects, k classes, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dynaip_jax.shapeland import world
from dynaip_jax.shapeland.world import BACKGROUNDS, CLASSES, EMBLEMS, LIGHTS, PATTERNS, POSITIONS, Scene

BATCH = 64  # cases sampled or judged at once


class Cases(NamedTuple):
    """Cases 0 to n - 1 of one number of subjects. Pictures are uint8."""

    scenes: list[Scene]  # of the prompts
    shown: list[tuple[Scene, ...]]  # of the references, close views
    references: np.ndarray  # [n, s, H, W, 3]
    reposed: np.ndarray  # [n, H, W, 3], the same subjects in the same columns, all else drawn again
    renders: np.ndarray  # [n, H, W, 3], ground-truth renders of the prompts in yet another pose
    masks: np.ndarray  # float32 [n, s, H, W], where the subjects are in the prompts' scenes


class Truth(NamedTuple):
    """What scenes show; -1 for a class that is not in the scene."""

    position: np.ndarray  # [n, k], index of the class's column
    background: np.ndarray  # [n], index
    light: np.ndarray  # [n], index
    number: np.ndarray  # [n], of subjects
    colours: np.ndarray  # float32 [n, k, 2, 3], in [0, 1]
    pattern: np.ndarray  # [n, k], index
    emblem: np.ndarray  # [n, k], index


def make_cases(subjects: int, seed: int, num: int) -> Cases:
    """The cases of a seed. Each is a function of (seed, its number, the number of subjects) alone."""
    scenes, shown, reposed, renders, masks = [], [], [], [], []
    for n in range(num):
        rng = world.generator(seed, "test", n)
        scene = world.sample_scene(rng, subjects)
        views = tuple(world.close_view(rng, s) for s in scene.subjects)
        drawn = repose(rng, scene)._replace(background=scene.background, light=scene.light)
        scenes.append(scene)
        shown.append(views)
        renders.append(world.render(drawn).image)
        reposed.append(world.render(repose(rng, scene)).image)
        masks.append(world.render(scene).masks)
    references = [np.stack([world.render(view).image for view in views]) for views in shown]
    return Cases(scenes, shown, *(np.stack(x) for x in (references, reposed, renders, masks)))


def repose(rng: np.random.Generator, scene: Scene) -> Scene:
    """The subjects of a scene in their columns; places, rotations, light and background are drawn again."""
    subjects = [(s.kind, s.identity) for s in scene.subjects]
    while True:
        again = world.sample_scene(rng, subjects=subjects)
        if [s.position for s in again.subjects] == [s.position for s in scene.subjects]:
            return again


def truth(scenes: Sequence[Scene]) -> Truth:
    """What the judge should find in scenes."""
    position, pattern, emblem = (np.full((len(scenes), len(CLASSES)), -1) for _ in range(3))
    colours = np.full((len(scenes), len(CLASSES), 2, 3), -1, np.float32)
    for n, scene in enumerate(scenes):
        for s in scene.subjects:
            k, i = CLASSES.index(s.kind), s.identity
            position[n, k] = list(POSITIONS).index(s.position)
            pattern[n, k], emblem[n, k] = PATTERNS.index(i.pattern), EMBLEMS.index(i.emblem)
            colours[n, k] = i.first, i.second
    background = np.array([BACKGROUNDS.index(scene.background) for scene in scenes])
    light = np.array([list(LIGHTS).index(scene.light) for scene in scenes])
    number = np.array([len(scene.subjects) for scene in scenes])
    return Truth(position, background, light, number, colours, pattern, emblem)


def batches(count: int) -> Iterator[tuple[np.ndarray, int]]:
    """(indices of a batch, how many of them are new) of all batches. All have one size; the last is filled up with the last index."""
    size = min(BATCH, count)
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size), count - 1), min(size, count - start)
