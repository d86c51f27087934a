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

CELL, STRIP, FONT = 112, 22, 15  # pixels
UNSEEN = range(10)  # numbers of identities of the test split, one of each class
SEVERAL = ((0, 1), (2, 3), (4, 5, 6), (7, 8, 9))  # of them in one picture
HEADER = ("reference", "DDS off", "DDS on", "DDS off", "DDS on")
LOOK_AT = (
    "Each row: a reference that the model has never seen, and two scenes with it. Look whether the subject has its colours, pattern and emblem, and "
    "whether background, light and column are the prompt's: with DDS off they tend to be the reference's. Below: two and three subjects."
)
MEASURED = {1: ["default", "dds-off", "text-only", "true-render"], 2: ["default", "regions-none", "text-only"]}
CASES = 64
GRANULARITY = {"low level": (1, 0, 0), "middle level": (0, 1, 0), "high level": (0, 0, 1)}

Panels = dict[str, np.ndarray]  # label -> uint8 [H, W, 3]
Painter = Callable[..., np.ndarray]  # (prompt, *references, **options of sampling) -> uint8 [H, W, 3]


def draw(output: Path, reference: Path | None = None, prompt: str | None = None, *, overwrite: bool) -> images.Kept:
    """Writes the figure: with references out of Shapeland, or with your own `reference` and `prompt` (pass both). Says where."""
    picture = _painter()
    if reference is not None and prompt is not None:
        rows = _own(picture, prompt, images.load_image(reference))
        settings: dict[str, Any] = dict(rows=[[text, *panels] for text, panels in rows])
        figure = _figure(rows)
    else:
        strips, prompts = _unseen(picture)
        settings = dict(prompts=prompts)
        figure = _stacked(strips)
    with finishing():
        return images.keep_png(figure, output, settings, overwrite=overwrite)


def measures() -> str:
    """The judge's accuracy and a short table: the `MEASURED` rows on `CASES` cases each, as text."""
    pipe, judge = DynaIPPipeline.load(*default.paths()), read_tree(default.JUDGE)
    calibrations = {s: calibrate(judge, s) for s in MEASURED}
    rows = [
        measured.row
        for s, names in MEASURED.items()
        for measured in evaluate(pipe, judge, names, [s], num=CASES, progress=True, calibrations=calibrations)
    ]
    return f"The judge on true renders:\n\n{judge_table(calibrations)}\n\n{table(rows)}"


def _painter() -> Painter:
    """Draws a prompt with the embedded model, which uses its adapter if there are references."""
    bundle, adapter = default.paths()
    pipe, base = DynaIPPipeline.load(bundle, adapter), DynaIPPipeline.load(bundle)

    def picture(text: str, *references: np.ndarray, **options: Any) -> np.ndarray:
        return np.asarray((pipe if references else base)(text, references, seed=0, **options).images[0])

    return picture


def _own(picture: Painter, text: str, reference: np.ndarray) -> list[tuple[str, Panels]]:
    """Rows for a reference of one's own: against text alone and without DDS, and by CLIP's levels."""
    compared = {
        "reference": images.square(reference),
        "text only": picture(text),
        "DDS off": picture(text, reference, text_gain=1.0),
        "DDS on (default)": picture(text, reference),
    }
    levels = {label: picture(text, reference, granularity=weights) for label, weights in GRANULARITY.items()}
    return [(text, compared), (f"granularity: {text}", levels | {"router (default)": compared["DDS on (default)"]})]


def _unseen(picture: Painter) -> tuple[list[Image.Image], list[str]]:
    """Strips of five cells for references that nobody chose, and all prompts: each alone in two scenes, then several together."""
    strips, prompts = [_strip(HEADER)], []
    subjects = {n: (world.CLASSES[n], world.drawing(world.CLASSES[n], n)) for n in UNSEEN}
    for n, (kind, shown) in subjects.items():
        scenes = [_scene(n, [kind], again) for again in range(2)]
        texts = [world.caption(scene) for scene in scenes]
        pairs = [[picture(text, shown, text_gain=gain) for gain in (1.0, 0.0)] for text in texts]
        strips += [_strip([kind, *map(_setting, scenes)], wide=2), _cells([shown, *pairs[0], *pairs[1]])]
        prompts += texts
    for group in SEVERAL:
        kinds, shown_ones = zip(*(subjects[n] for n in group), strict=True)
        text = world.caption(_scene(group[0], kinds, 2))
        both = [picture(text, *shown_ones, words=list(kinds), text_gain=gain) for gain in (1.0, 0.0)]
        gap = [np.full_like(both[0], 255)] * (len(HEADER) - len(group) - len(both))
        strips += [_strip([text], wide=len(HEADER)), _cells([*shown_ones, *gap, *both])]
        prompts.append(text)
    return strips, prompts


def _scene(number: int, kinds: Sequence[str], again: int) -> world.Scene:
    """A scene of these classes, a function of its arguments alone."""
    rng = np.random.default_rng((world.SPLITS["test"], number, again))
    return world.sample_scene(rng, subjects=[(kind, world.sample_identity(rng)) for kind in kinds])


def _setting(scene: world.Scene) -> str:
    """What the prompt says of the setting of one subject, in short."""
    return f"{scene.subjects[0].position}, {scene.background}, {scene.light}"


def _cells(pictures: Sequence[np.ndarray]) -> Image.Image:
    size = (CELL, CELL)
    return images.grid(
        [Image.fromarray(p).resize(size, Image.Resampling.BICUBIC) for p in pictures], columns=len(HEADER)
    )


def _strip(texts: Sequence[str], wide: int = 1) -> Image.Image:
    """A line of texts; the first has one cell, each other one `wide` cells. A text alone has the whole line."""
    strip = Image.new("RGB", (CELL * len(HEADER), STRIP), "white")
    for n, text in enumerate(texts):
        left = CELL * (1 + (n - 1) * wide) if n else 0
        ImageDraw.Draw(strip).text((left + 3, 2), text, fill="black", font=ImageFont.load_default(size=FONT))
    return strip


def _stacked(strips: Sequence[Image.Image]) -> Image.Image:
    return Image.fromarray(np.concatenate([np.asarray(strip) for strip in strips]))


def _figure(rows: Sequence[tuple[str, Panels]]) -> Image.Image:
    """Rows of four labelled panels, each under its title."""
    parts = []
    for title, panels in rows:
        cells = images.grid([images.labelled(image, label, CELL) for label, image in panels.items()], columns=4)
        strip = _strip([title]).crop((0, 0, cells.width, STRIP))
        parts += [strip, cells]
    return _stacked(parts)
