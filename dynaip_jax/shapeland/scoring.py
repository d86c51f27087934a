"""From the judge's verdicts to CP and PF, and how far the judge can be trusted.

- PF (prompt following): share of the prompt's attributes that the judge finds in the picture: each class, each class in its
  column, the background, the light, the number of subjects; 2 s + 3 attributes in all.
- CP (concept preservation): cosine of the judge's identity embeddings of the picture and of a ground-truth render of the same
  subjects in a new pose, averaged over the subjects. CP is scaled so that 1.0 is a ground-truth render of the same subject in a
  new pose and 0.0 a different subject of the same class, both on average. It is not clipped.
- Parts of PF: each attribute alone. Parts of CP: how well the judge's reading of colours, pattern and emblem agrees with the truth,
  scaled as CP is.
- Leak: where the prompt states another background, light or column than the reference shows, how often the picture has the
  reference's. Close views are all in the middle.

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
from dynaip_jax.shapeland.judge import Verdict, colour_errors, judge
from dynaip_jax.shapeland.world import CLASSES, POSITIONS

HELD_OUT, FIRST_HELD_OUT = 512, 1_000_000  # test scenes that calibrate the judge: how many, and the number of the first
TRUSTED = 0.98  # accuracy below which the judge is doubted
ATTRIBUTES = ("classes", "position", "background", "light", "count")  # that PF counts
IDENTITY_PARTS = ("colours", "pattern", "emblem")


class Calibration(NamedTuple):
    """The judge on ground-truth renders of one number of subjects: mean cosine of two renders of one identity (`same`) and of two
    identities of one class (`other`); `parts`: the same of the agreement with a render's own and with another's parts; `accuracy` by
    attribute."""

    same: float
    other: float
    parts: dict[str, tuple[float, float]]
    accuracy: dict[str, float]


class Scores(NamedTuple):
    """Of n cases: CP and PF `[n]`; `parts` of both and leaks by name, `[n]` each, NaN where a case does not ask for it."""

    cp: np.ndarray
    pf: np.ndarray
    parts: dict[str, np.ndarray]


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
    agreed: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {name: ([], []) for name in IDENTITY_PARTS}
    for k in range(len(CLASSES)):
        rows = np.flatnonzero(drawn[:, k])
        identity = verdict.identity[rows, k]
        cosines = identity[::2] @ identity[1::2].T
        own = np.diag(cosines)
        others = cosines[~np.eye(len(own), dtype=bool)].reshape(len(own), -1)
        same.append(own)
        other.append(others.mean(axis=1))
        closest.append((own[:, None] > others).mean(axis=1))
        for name, pair in agreed.items():
            for agreements, asked_of in zip(pair, (rows, np.roll(rows, 2)), strict=True):
                agreements.append(_agreement(name, getattr(verdict, name)[rows, k], getattr(asked, name)[asked_of, k]))
    parts = {name: (_mean(own), _mean(another)) for name, (own, another) in agreed.items()}
    return Calibration(
        same=_mean(same),
        other=_mean(other),
        parts=parts,
        accuracy=dict(
            classes=float(((verdict.present > 0) == drawn).all(axis=1).mean()),
            position=float((verdict.position.argmax(-1) == asked.position)[drawn].mean()),
            background=float((verdict.background.argmax(-1) == asked.background).mean()),
            light=float((verdict.light.argmax(-1) == asked.light).mean()),
            count=float((verdict.number.argmax(-1) == asked.number).mean()),
            identity=_mean(closest),
            **{name: own for name, (own, _) in parts.items()},
        ),
    )


def _mean(parts: Sequence[Any]) -> float:
    return float(np.concatenate(parts).mean())


def _agreement(name: str, found: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """How well one of `IDENTITY_PARTS` is read as it is `asked`, from 0 to 1: colours `[..., 2, 3]`, or logits `[..., m]` and an index `[...]`."""
    if name == "colours":
        return 1 - np.asarray(colour_errors(found, asked))
    return (found.argmax(-1) == asked).astype(float)


def scores(judge_params: Any, pictures: np.ndarray, cases: Cases, calibration: Calibration) -> Scores:
    """The scores of pictures uint8 `[n, H, W, 3]`, one a case."""
    asked = truth(cases.scenes)
    wanted = asked.position >= 0
    seen, target = read(judge_params, pictures), read(judge_params, cases.reposed)
    cosine = np.einsum("nkd,nkd->nk", seen.identity, target.identity)

    def of_subjects(each: Any) -> np.ndarray:
        return (each * wanted).sum(axis=1) / asked.number

    present = (seen.present > 0) & wanted
    column = seen.position.argmax(-1)
    followed: dict[str, Any] = dict(
        classes=of_subjects(present),
        column=of_subjects(present & (column == asked.position)),
        background=seen.background.argmax(-1) == asked.background,
        light=seen.light.argmax(-1) == asked.light,
        number=seen.number.argmax(-1) == asked.number,
    )
    correct = sum(share * (asked.number if name in ("classes", "column") else 1) for name, share in followed.items())
    kept = {
        name: (of_subjects(_agreement(name, getattr(seen, name), getattr(asked, name))) - other) / (same - other)
        for name, (same, other) in calibration.parts.items()
    }
    return Scores(
        cp=(of_subjects(cosine) - calibration.other) / (calibration.same - calibration.other),
        pf=correct / (2 * asked.number + 3),
        parts=dict(
            **{f"CP {name}": value for name, value in kept.items()},
            **{f"PF {name}": np.asarray(value, float) for name, value in followed.items()},
            **{f"leak {name}": value for name, value in _leaks(seen, present, asked, cases).items()},
        ),
    )


def _leaks(seen: Verdict, present: Any, asked: Truth, cases: Cases) -> dict[str, np.ndarray]:
    """Leaks `[n]`: mean over the references that differ from the prompt, NaN where none does."""
    shown = [truth([views[s] for views in cases.shown]) for s in range(cases.references.shape[1])]
    leaks = {}
    for name in ("background", "light"):
        read_as, prompt = getattr(seen, name).argmax(-1), getattr(asked, name)
        leaks[name] = _share([(getattr(t, name) != prompt, getattr(t, name) == read_as) for t in shown])
    column, middle = seen.position.argmax(-1), list(POSITIONS).index("middle")
    aside = (asked.position >= 0) & (asked.position != middle) & present
    leaks["column"] = _share(list(zip(aside.T, (column == middle).T, strict=True)))
    return leaks


def _share(each: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Of pairs (whether it counts, whether it is so), `[n]` each: the share that is so, NaN where none counts."""
    counts, so = (np.stack(x) for x in zip(*each, strict=True))
    number = counts.sum(axis=0)
    return np.where(number > 0, (counts & so).sum(axis=0) / np.maximum(number, 1), np.nan)


def doubts(calibrations: Mapping[int, Calibration]) -> list[str]:
    """A line for each attribute that the judge reads less than `TRUSTED` well in ground-truth renders."""
    return [
        f"the judge reads {what} of {s} subject{'s' * (s > 1)} right in {share:.1%} of true renders, less than {TRUSTED:.0%}"
        for s, calibration in calibrations.items()
        for what, share in calibration.accuracy.items()
        if what in ATTRIBUTES and share < TRUSTED
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
