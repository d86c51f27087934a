"""Maps as figures and numbers: where subjects act in a picture, what of their references is looked at, and how well a map fits a mask.

Axis letters as in `dynaip_jax.types`; H, W pixels; g, k rows and columns of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dynaip_jax.eval.figures import Cell, table

MOST = 8  # blocks that a figure shows unless it is told which
BINS = 64  # of the histogram that a threshold is chosen on


class View(NamedTuple):
    """What a figure shows of a picture that was looked into: `label`; `picture` uint8 `[H, W, 3]`; `places` `[l, s, g, k]`, how strongly
    each subject acts where; `read` `[2, l, s, m]`, what image rows and text rows read of each reference; `text_gain` of each subject."""

    label: str
    picture: np.ndarray
    places: np.ndarray
    read: np.ndarray
    text_gain: Sequence[float]


def chosen(blocks: int, most: int = MOST) -> list[int]:
    """Some of so many blocks, evenly far apart, the first and the last among them."""
    return sorted({round(n) for n in np.linspace(0, blocks - 1, min(blocks, most))})


def figure(
    views: Sequence[View],
    references: Sequence[np.ndarray],
    names: Sequence[str],
    title: str = "",
    blocks: Sequence[int] | None = None,
) -> Image.Image:
    """For each view and subject a row of its places over the picture, and a row of what text rows read of its reference; a column for
    the mean of all blocks and one for each of `blocks`. `names`: of the blocks; `references`: uint8 `[H, W, 3]`, squares."""
    shown = chosen(len(names)) if blocks is None else list(blocks)
    cells, rows = [], []
    for view in views:
        for s, reference in enumerate(references):
            subject = f"subject {s + 1}" if len(references) > 1 else "subject"
            places = [view.places[:, s].mean(axis=0), *(view.places[block, s] for block in shown)]
            cells.append([Cell(view.picture), *(Cell(view.picture, heat, _range(heat)) for heat in places)])
            rows.append(f"{view.label}\nimage branch, {subject}".strip())
            for branch, name in enumerate(("image", "text")):
                read = view.read[branch]
                heats = [read[:, s].mean(axis=0), *(read[block, s] for block in shown)]
                grids = [on_grid(heat) for heat in heats]
                cells.append([Cell(reference), *(Cell(reference, heat, _range(heat)) for heat in grids)])
                gain = f" (gain {view.text_gain[s]:g})" if name == "text" else ""
                rows.append(f"read by\n{name} rows{gain}")
    columns = ["", "mean of blocks", *(names[block] for block in shown)]
    return table(cells, columns, rows, title)


def regions_figure(
    pictures: Sequence[np.ndarray], regions: np.ndarray, labels: Sequence[str], title: str = ""
) -> Image.Image:
    """Found regions `[steps, s, g, k]` over the `pictures` as they were expected at those steps, a column each; rows are subjects."""
    cells = [
        [Cell(picture, region, _range(region)) for picture, region in zip(pictures, regions[:, s], strict=True)]
        for s in range(regions.shape[1])
    ]
    return table(cells, labels, [f"subject {s + 1}" for s in range(regions.shape[1])], title)


def _range(heat: np.ndarray) -> str:
    return f"{heat.min():.3g} to {heat.max():.3g}"


def on_grid(tokens: np.ndarray) -> np.ndarray:
    """Values `[m]` of a reference's tokens as a square where they have a place: CLIP's patches, without the class token before them;
    otherwise one row."""
    side = math.isqrt(len(tokens))
    if side * side == len(tokens) and side > 1:
        return tokens.reshape(side, side)
    if side * side + 1 == len(tokens) and side > 1:
        return tokens[1:].reshape(side, side)
    return tokens[None]


def threshold(values: np.ndarray) -> float:
    """What parts values into two groups best, by Otsu's criterion: the largest variance between the groups. Source: Otsu 1979."""
    counts, edges = np.histogram(values, BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    sums = np.cumsum(counts * centres)
    low = sums[:-1] / np.maximum(below, 1)
    high = (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(edges[1 + int(np.argmax(below * above * (low - high) ** 2))])


def overlap(heat: np.ndarray, mask: np.ndarray) -> float:
    """Intersection over union of a `mask` `[H, W]` (inside from 0.5 on) and the part of a map `[g, k]`, made as large, that lies above its
    own `threshold`."""
    wide = Image.fromarray(heat.astype(np.float32)).resize(mask.shape[::-1], Image.Resampling.BICUBIC)
    inside, found = mask >= 0.5, np.asarray(wide) > threshold(heat)
    union = np.sum(inside | found)
    return float(np.sum(inside & found) / union) if union else 1.0


def as_values(views: Sequence[View], names: Sequence[str], digits: int = 5) -> dict[str, Any]:
    """What the figure shows, as JSON holds it."""

    def plain(array: np.ndarray) -> Any:
        return np.asarray(array, np.float64).round(digits).tolist()

    return dict(
        blocks=list(names),
        axes=dict(
            places="block, subject, row, column",
            read_by_image="block, subject, token",
            read_by_text="block, subject, token",
        ),
        views=[
            dict(
                label=view.label,
                text_gain=list(view.text_gain),
                places=plain(view.places),
                read_by_image=plain(view.read[0]),
                read_by_text=plain(view.read[1]),
            )
            for view in views
        ],
    )
