"""One figure that shows what the method does, and a short table that measures it, with the embedded model of Shapeland."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dynaip_jax import images
from dynaip_jax.interrupts import finishing
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland import default, world
from dynaip_jax.shapeland.measure import evaluate, table
from dynaip_jax.shapeland.scoring import calibrate, judge_table
from dynaip_jax.storage.tensors import read_tree

CELL, STRIP = 160, 26  # pixels
SUBJECTS = (("star", 0), ("heart", 1))  # class, number of its identity in the test split
PROMPTS = ("a star on the left on sand at noon", "a star on the right on wood at dusk")
TWO = "a star on the left and a heart on the right on grass at noon"
MEASURED = {1: ["default", "dds-off", "text-only", "true-render"], 2: ["default", "regions-none", "text-only"]}
CASES = 64
GRANULARITY = {"low level": (1, 0, 0), "middle level": (0, 1, 0), "high level": (0, 0, 1)}

Panels = dict[str, np.ndarray]  # label -> uint8 [H, W, 3]
Painter = Callable[..., np.ndarray]  # (prompt, *references, **options of sampling) -> uint8 [H, W, 3]


def draw(output: Path, reference: Path | None = None, prompt: str | None = None, *, overwrite: bool) -> images.Kept:
    """Writes the figure: with references out of Shapeland, or with your own `reference` and `prompt` (pass both). Says where."""
    if reference is not None and prompt is not None:
        first, prompts = images.load_image(reference), [prompt]
    else:
        first, prompts = world.drawing(*SUBJECTS[0]), list(PROMPTS)
    picture = _painter()
    rows = [(text, _comparison(picture, text, first)) for text in prompts]
    levels = {label: picture(prompts[0], first, granularity=weights) for label, weights in GRANULARITY.items()}
    rows.append((f"granularity: {prompts[0]}", levels | {"router (default)": rows[0][1]["DDS on (default)"]}))
    if reference is None:
        rows.append((TWO, _two_subjects(picture, first, world.drawing(*SUBJECTS[1]))))
    settings = dict(rows=[[text, *panels] for text, panels in rows])
    with finishing():
        return images.keep_png(_figure(rows), output, settings, overwrite=overwrite)


def measures() -> str:
    """The judge's accuracy and a short table: the `MEASURED` rows on `CASES` cases each, as text."""
    pipe, judge = DynaIPPipeline.load(*default.paths()), read_tree(default.JUDGE)
    calibrations = {s: calibrate(judge, s) for s in MEASURED}
    rows = [
        row
        for s, names in MEASURED.items()
        for row in evaluate(pipe, judge, names, [s], num=CASES, progress=True, calibrations=calibrations)
    ]
    return f"The judge on true renders:\n\n{judge_table(calibrations)}\n\n{table(rows)}"


def _painter() -> Painter:
    """Draws a prompt with the embedded model, which uses its adapter if there are references."""
    bundle, adapter = default.paths()
    pipe, base = DynaIPPipeline.load(bundle, adapter), DynaIPPipeline.load(bundle)

    def picture(text: str, *references: np.ndarray, **options: Any) -> np.ndarray:
        return np.asarray((pipe if references else base)(text, references, seed=0, **options).images[0])

    return picture


def _comparison(picture: Painter, text: str, reference: np.ndarray) -> Panels:
    return {
        "reference": images.square(reference),
        "text only": picture(text),
        "DDS off": picture(text, reference, text_gain=1.0),
        "DDS on (default)": picture(text, reference),
    }


def _two_subjects(picture: Painter, first: np.ndarray, second: np.ndarray) -> Panels:
    words = [kind for kind, _ in SUBJECTS]
    return {
        "second reference": second,
        "text only": picture(TWO),
        "no regions": picture(TWO, first, second),
        "found regions (default)": picture(TWO, first, second, words=words),
    }


def _figure(rows: Sequence[tuple[str, Panels]]) -> Image.Image:
    """Rows of labelled panels, each under its title."""
    parts = []
    for title, panels in rows:
        cells = images.grid([images.labelled(image, label, CELL) for label, image in panels.items()], columns=4)
        strip = Image.new("RGB", (cells.width, STRIP), "white")
        ImageDraw.Draw(strip).text((3, 5), title, fill="black", font=ImageFont.load_default(size=14))
        parts.append(np.concatenate([np.asarray(strip), np.asarray(cells)]))
    return Image.fromarray(np.concatenate(parts))
