"""Scores that networks give: how like a picture is to its subjects and to its prompt, and which subjects have collapsed.

CLIP-I and DINO-I: the mean cosine of the picture and each picture of a subject, over subjects (Ruiz et al., arXiv 2208.12242). CLIP-T: the cosine
of the picture and the prompt. Every column names its network: numbers of different ones do not compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dynaip_jax import images
from dynaip_jax.measuring.collapse import collapsed, cut_out, found_regions
from dynaip_jax.measuring.networks import ClipMeasure, DinoMeasure
from dynaip_jax.measuring.sets import Case

Measure = ClipMeasure | DinoMeasure


class Likeness:
    """Measures pictures by networks. Embeddings of reference pictures and prompts are made once."""

    def __init__(self, measures: Sequence[Measure]):
        self._measures = list({m.name: m for m in measures}.values())
        self._known: dict[tuple[str, str], np.ndarray] = {}

    def scores(self, case: Case, picture: np.ndarray) -> dict[str, float | None]:
        """By column, of a picture uint8 `[H, W, 3]`. The share of collapsed subjects (of several) is told by the last DINO."""
        found: dict[str, float | None] = {}
        for measure in self._measures:
            kind = "CLIP" if isinstance(measure, ClipMeasure) else "DINO"
            own = measure.images([picture])[0]
            near = [float((self._pictures(measure, s.pictures) @ own).mean()) for s in case.subjects]
            found[f"{kind}-I, {measure.name}"] = float(np.mean(near))
            if isinstance(measure, ClipMeasure):
                found[f"CLIP-T, {measure.name}"] = float(self._text(measure, case.prompt) @ own)
        dinos = [m for m in self._measures if isinstance(m, DinoMeasure)]
        if dinos and len(case.subjects) > 1:
            found["collapsed"] = self._collapsed(dinos[-1], case, picture)
        return found

    def _collapsed(self, measure: DinoMeasure, case: Case, picture: np.ndarray) -> float:
        """The share of the subjects that have collapsed."""
        given = all(subject.mask for subject in case.subjects)
        if given:
            regions = [images.read_mask(subject.mask).values > 0.5 for subject in case.subjects]
        else:
            regions = found_regions(measure.patches(picture), len(case.subjects))
        subjects = np.stack([_unit(self._pictures(measure, s.pictures).mean(axis=0)) for s in case.subjects])
        embedded = measure.images(cut_out(picture, regions)) if regions else np.zeros((0, subjects.shape[1]))
        return float(collapsed(embedded, subjects, given).mean())

    def _pictures(self, measure: Measure, files: Iterable[str]) -> np.ndarray:
        """Embeddings `[n, d]` of files."""
        made = []
        for file in files:
            key = (measure.name, file)
            if key not in self._known:
                self._known[key] = measure.images([images.load_image(file)])[0]
            made.append(self._known[key])
        return np.stack(made)

    def _text(self, measure: ClipMeasure, text: str) -> np.ndarray:
        key = (measure.name, f"\0{text}")  # no file has such a name
        if key not in self._known:
            self._known[key] = measure.texts([text])[0]
        return self._known[key]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)
