"""Training data out of Shapeland, as records of the trainer's data format."""

from __future__ import annotations

from typing import Literal

import numpy as np

from dynaip_jax.data.check import png
from dynaip_jax.data.records import Record
from dynaip_jax.shapeland.world import (
    SIZE,
    Scene,
    article,
    caption,
    close_view,
    description,
    generator,
    render,
    sample_scene,
)

CLOSE_SCENES = 0.08  # share of the base model's scenes that are a close view
COUNTS = {
    1: 0.5,
    2: 0.78,
    3: 1.0,
}  # number of subjects: cumulated share of the base model's scenes, close views included
CLOSE_PAIRS = 0.15  # share of the adapter's targets that are a close view
DESCRIBED = 0.4  # share of one-subject scenes whose caption tells the look


def sample_mixed(rng: np.random.Generator) -> Scene:
    """A scene of the mixture that the base model is trained on: 1 to 3 subjects, a few of them seen close."""
    u = rng.random()
    if u < CLOSE_SCENES:
        return sample_scene(rng, 1, large=True)
    return sample_scene(rng, next(count for count, share in COUNTS.items() if u < share))


def scene_record(seed: int, n: int, split: str = "train") -> Record:
    """Record n for text to image: a scene of 1 to 3 subjects with its caption or, for a share of those of one subject, its
    description, since a base model knows words for looks too."""
    rng = generator(seed, split, n)
    scene = sample_mixed(rng)
    described = len(scene.subjects) == 1 and rng.random() < DESCRIBED
    return _record(n, scene, None, description(scene) if described else caption(scene))


def pair_record(seed: int, n: int, split: str = "train", reference: Literal["other", "same"] = "other") -> Record:
    """Record n for the adapter: a scene of one subject, and as reference a close view of the same subject in another scene
    ("other") or the scene itself ("same")."""
    rng = generator(seed, split, n)
    scene = sample_scene(rng, 1, large=bool(rng.random() < CLOSE_PAIRS))
    close = close_view(rng, scene.subjects[0]) if reference == "other" else None
    return _record(n, scene, close, caption(scene))


def _record(n: int, scene: Scene, reference: Scene | None, text: str) -> Record:
    picture = render(scene)
    shown = render(reference) if reference else picture
    whole = np.array([0, 0, SIZE, SIZE], np.int32)
    return Record(
        number=n + 1,
        target=png(picture.image),
        target_box=whole,
        reference=png(shown.image) if reference else b"",
        reference_box=whole,
        mask=png(np.round(shown.masks[0] * 255).astype(np.uint8)) if reference or len(scene.subjects) == 1 else b"",
        caption=text,
        subject=article(scene.subjects[0].kind),
    )
