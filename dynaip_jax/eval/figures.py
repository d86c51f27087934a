"""Tables of pictures as one figure, by matplotlib: what varies is written on their edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

DPI = 120
SIDES = (150, 400)  # pixels of a cell, at least and at most
PALEST, STRONGEST = 0.1, 0.8  # opacity of a map over its picture, where it is lowest and highest


class Cell(NamedTuple):
    """A `picture` uint8 `[H, W, 3]`, a map over it (`heat` `[h, w]`, of any scale), and a line below."""

    picture: np.ndarray
    heat: np.ndarray | None = None
    label: str = ""


def table(
    cells: Sequence[Sequence[Cell | None]], columns: Sequence[str], rows: Sequence[str], title: str = ""
) -> Image.Image:
    """Rows of cells, each row with a name at its left and each column with one above; None leaves a place empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    widths = [cell.picture.shape[1] for row in cells for cell in row if cell is not None]
    side = float(np.clip(max(widths), *SIDES)) / DPI
    count = max(map(len, cells))
    size = (side * 1.08 * count + 0.5, (side * 1.12 + 0.25) * len(cells) + 0.5)
    sheet = Figure(figsize=size, dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(sheet)
    sheet.suptitle(title, fontsize="medium", wrap=True)
    for axes, row, name in zip(sheet.subplots(len(cells), count, squeeze=False), cells, rows, strict=True):
        axes[0].set_ylabel(name, fontsize="small")
        for axis, cell in zip(axes, [*row, *[None] * (count - len(row))], strict=True):
            axis.set(xticks=[], yticks=[])
            if cell is None:
                axis.set_visible(False)
                continue
            axis.imshow(cell.picture, interpolation="nearest")
            if cell.heat is not None:
                axis.imshow(coloured(cell.heat, cell.picture.shape[:2]), interpolation="nearest")
            axis.set_xlabel(cell.label, fontsize="x-small")
    for axis, name in zip(sheet.axes, columns, strict=False):
        axis.set_title(name, fontsize="small")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def coloured(heat: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map `[h, w]` from its lowest to its highest value in colours, float `[H, W, 4]`, the more opaque the higher."""
    from matplotlib import colormaps

    low, high = float(heat.min()), float(heat.max())
    unit = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    wide = Image.fromarray(unit.astype(np.float32)).resize(size[::-1], Image.Resampling.BICUBIC)
    values = np.clip(np.asarray(wide), 0, 1)
    colours = colormaps["inferno"](values)
    colours[..., 3] = PALEST + (STRONGEST - PALEST) * values
    return colours


def shares(values: np.ndarray, names: Sequence[str], parts: Sequence[str], summary: Sequence[str] = ()) -> Image.Image:
    """A bar for each of `n` names, `values` `[n, p]` stacked, rows summing to 1; `summary`: a line for each part in the legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(6.4, 1.4 + 0.28 * len(names)), dpi=DPI, layout="constrained")
    canvas, axis = FigureCanvasAgg(sheet), sheet.subplots()
    left = np.zeros(len(names))
    for part, column, more in zip(parts, np.asarray(values).T, summary or [""] * len(parts), strict=True):
        axis.barh(range(len(names)), column, left=left, label=f"{part} {more}".strip(), height=0.8)
        left = left + column
    axis.set(xlim=(0, 1), xlabel="weight", yticks=range(len(names)))
    axis.set_yticklabels([name if len(name) <= 32 else f"...{name[-29:]}" for name in names], fontsize="small")
    axis.invert_yaxis()
    sheet.legend(loc="outside upper center", ncols=len(parts), fontsize="small")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
