"""Training data out of Shapeland, as records of the trainer's data format."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dynaip_jax.data.check import png
from dynaip_jax.data.records import Record
from dynaip_jax.shapeland.world import (
    SAYABLE,
    SIZE,
    Placed,
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
DESCRIBED = 0.6  # share of the base model's scenes whose caption tells the look of the subjects
UNSAID = (
    0.5  # probability that a caption leaves open each of `SAYABLE`, as captions of photographs leave most things open
)
TWINS = 0.6  # share of the base model's scenes of one subject that have a reference of kind "twin"
KINDS = (  # of references, by what the adapter sees of a target's subject
    "same",  # the target itself, of which the trainer takes a part
    "twin",  # a close view on the target's background and in its light
    "shared",  # a close view on the target's background or in its light
    "other",  # a close view in a setting of its own
)
REFERENCES = {"same": 0.4, "twin": 0.6}  # kind: share of the pairs


def sample_mixed(rng: np.random.Generator) -> Scene:
    """A scene of the mixture that the base model is trained on: 1 to 3 subjects, a few of them seen close."""
    u = rng.random()
    if u < CLOSE_SCENES:
        return sample_scene(rng, 1, large=True)
    return sample_scene(rng, next(count for count, share in COUNTS.items() if u < share))


def sample_said(rng: np.random.Generator, unsaid: float) -> tuple[str, ...]:
    """What a caption says of a scene: each of `SAYABLE` is left out with probability `unsaid`."""
    return tuple(part for part in SAYABLE if rng.random() >= unsaid)


def sample_text(rng: np.random.Generator, scene: Scene, unsaid: float = UNSAID) -> str:
    """What the base model reads of a scene: its caption or, for a share `DESCRIBED` of the scenes, its description."""
    described = rng.random() < DESCRIBED
    said = sample_said(rng, unsaid)
    return description(scene, said) if described else caption(scene, said)


def scene_record(seed: int, n: int, split: str = "train", unsaid: float = UNSAID) -> Record:
    """Record n for text to image: a scene of 1 to 3 subjects with `sample_text`. For a base that is trained together with an adapter,
    `TWINS` of those with one have a twin as the reference; the others are their own."""
    rng = generator(seed, split, n)
    scene = sample_mixed(rng)
    text = sample_text(rng, scene, unsaid)
    twin = len(scene.subjects) == 1 and rng.random() < TWINS
    return _record(n, scene, _reference(rng, scene, "twin" if twin else "same"), text)


def pair_record(
    seed: int, n: int, split: str = "train", references: Mapping[str, float] = REFERENCES, unsaid: float = UNSAID
) -> Record:
    """Record n for the adapter: a scene of one subject, and a reference of one of `KINDS` (`references`: kind -> share)."""
    rng = generator(seed, split, n)
    scene = sample_scene(rng, 1, large=bool(rng.random() < CLOSE_PAIRS))
    kind = str(rng.choice(list(references), p=list(references.values())))
    return _record(n, scene, _reference(rng, scene, kind), caption(scene, sample_said(rng, unsaid)))


def _reference(rng: np.random.Generator, scene: Scene, kind: str) -> Scene | None:
    """The scene of a reference of the one subject of `scene`; None: `scene` itself."""
    match kind:
        case "same":
            return None
        case "twin":
            return close_view(rng, _only(scene))._replace(background=scene.background, light=scene.light)
        case "shared":
            shared = str(rng.choice(["background", "light"]))
            return close_view(rng, _only(scene))._replace(**{shared: getattr(scene, shared)})
        case "other":
            return close_view(rng, _only(scene))
    raise ValueError(f"reference {kind!r}: expected one of {KINDS}")


def _only(scene: Scene) -> Placed:
    (subject,) = scene.subjects
    return subject


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
