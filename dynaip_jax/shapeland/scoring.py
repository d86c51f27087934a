"""From the judge's verdicts to CP and PF, and how far the judge can be trusted.

- PF (prompt following): share of the prompt's attributes that the judge finds in the picture: each class, each class in its
  column, the background, the number of subjects; 2 s + 2 attributes in all.
- CP (concept preservation): cosine of the judge's identity embeddings of the picture and of a ground-truth render of the same
  subjects in a new pose, averaged over the subjects. CP is scaled so that 1.0 is a ground-truth render of the same subject in a
  new pose and 0.0 a different subject of the same class, both on average. It is not clipped.

Axis letters: n cases, s subjects, k classes, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dynaip_jax.eval.tables import aligned
from dynaip_jax.shapeland import world
from dynaip_jax.shapeland.cases import Cases, Truth, batches, repose, truth
from dynaip_jax.shapeland.judge import Verdict, judge
from dynaip_jax.shapeland.world import CLASSES

HELD_OUT, FIRST_HELD_OUT = 512, 1_000_000  # test scenes that calibrate the judge: how many, and the number of the first
TRUSTED = 0.98  # accuracy below which the judge is doubted


class Calibration(NamedTuple):
    """The judge on ground-truth renders of one number of subjects: mean cosine of two renders of one identity (`same`) and of two
    identities of one class (`other`); `accuracy` by attribute."""

    same: float
    other: float
    accuracy: dict[str, float]


def read(judge_params: Any, pictures: np.ndarray) -> Verdict:
    """The verdict on uint8 `[n, H, W, 3]`, as NumPy arrays."""
    parts = [
        jax.tree.map(lambda x, k=new: x[:k], judge(judge_params, pictures[numbers]))
        for numbers, new in batches(len(pictures))
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def calibrate(judge_params: Any, subjects: int) -> Calibration:
    """The judge on `HELD_OUT` scenes of so many subjects, each rendered in two poses."""
    scenes = []
    for n in range(FIRST_HELD_OUT, FIRST_HELD_OUT + HELD_OUT):
        rng = world.generator(0, "test", n)
        scene = world.sample_scene(rng, subjects)
        scenes += [scene, repose(rng, scene)]
    verdict = read(judge_params, np.stack([world.render(scene).image for scene in scenes]))
    return calibration(verdict, truth(scenes))


def calibration(verdict: Verdict, asked: Truth) -> Calibration:
    """The calibration of a verdict on pairs of renders of one identity, one pair after the other. `asked`: what they show."""
    drawn = asked.position >= 0
    same, other, closest = [], [], []
    for k in range(len(CLASSES)):
        identity = verdict.identity[drawn[:, k], k]
        cosines = identity[::2] @ identity[1::2].T
        own = np.diag(cosines)
        others = cosines[~np.eye(len(own), dtype=bool)].reshape(len(own), -1)
        same.append(own)
        other.append(others.mean(axis=1))
        closest.append((own[:, None] > others).mean(axis=1))
    return Calibration(
        same=float(np.concatenate(same).mean()),
        other=float(np.concatenate(other).mean()),
        accuracy=dict(
            classes=float(((verdict.present > 0) == drawn).all(axis=1).mean()),
            position=float((verdict.position.argmax(-1) == asked.position)[drawn].mean()),
            background=float((verdict.background.argmax(-1) == asked.background).mean()),
            count=float((verdict.number.argmax(-1) == asked.number).mean()),
            identity=float(np.concatenate(closest).mean()),
        ),
    )


def scores(
    judge_params: Any, pictures: np.ndarray, cases: Cases, calibration: Calibration
) -> tuple[np.ndarray, np.ndarray]:
    """CP and PF, `[n]` each, of pictures uint8 `[n, H, W, 3]`, one a case."""
    asked = truth(cases.scenes)
    wanted = asked.position >= 0
    seen, target = read(judge_params, pictures), read(judge_params, cases.reposed)
    cosine = np.einsum("nkd,nkd->nk", seen.identity, target.identity)
    mean = (cosine * wanted).sum(axis=1) / asked.number
    cp = (mean - calibration.other) / (calibration.same - calibration.other)
    present = (seen.present > 0) & wanted
    in_place = present & (seen.position.argmax(-1) == asked.position)
    correct = [
        present.sum(axis=1),
        in_place.sum(axis=1),
        seen.background.argmax(-1) == asked.background,
        seen.number.argmax(-1) == asked.number,
    ]
    return cp, np.sum(correct, axis=0) / (2 * asked.number + 2)


def doubts(calibrations: Mapping[int, Calibration]) -> list[str]:
    """A line for each attribute that the judge reads less than `TRUSTED` well in ground-truth renders."""
    return [
        f"the judge reads {what} of {s} subject{'s' * (s > 1)} right in {share:.1%} of true renders, less than {TRUSTED:.0%}"
        for s, calibration in calibrations.items()
        for what, share in calibration.accuracy.items()
        if what != "identity" and share < TRUSTED
    ]


def judge_table(calibrations: Mapping[int, Calibration]) -> str:
    """The judge on ground-truth renders as aligned text: its accuracies, and the cosines that CP maps to 1 and 0."""
    names = list(next(iter(calibrations.values())).accuracy)
    lines: list[Sequence[str]] = [("subjects", *names, "cos same", "cos other")]
    lines += [
        (str(s), *(f"{c.accuracy[n]:.3f}" for n in names), f"{c.same:.3f}", f"{c.other:.3f}")
        for s, c in calibrations.items()
    ]
    return aligned(lines)
