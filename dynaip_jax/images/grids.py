"""Several pictures in one: grids, and cells that say what they show."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw


def grid(images: Sequence[UInt8[np.ndarray, "H W 3"] | Image.Image], columns: int | None = None) -> Image.Image:
    """One picture of equally sized ones (uint8 `[H, W, 3]` or PIL), row by row; empty cells are white.

    `columns` defaults to the number that makes the grid about square. Raises `ValueError` for no or unequal pictures
    and for fewer than one column.
    """
    cells = [np.asarray(image) for image in images]
    shapes = sorted({cell.shape for cell in cells})
    if len(shapes) != 1:
        raise ValueError(f"grid of pictures shaped {shapes}: expected at least one picture, all of one size")
    columns = math.ceil(math.sqrt(len(cells))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"grid of {columns} columns: expected at least 1")
    columns = min(columns, len(cells))
    height, width, channels = shapes[0]
    canvas = np.full((math.ceil(len(cells) / columns) * height, columns * width, channels), 255, np.uint8)
    for n, cell in enumerate(cells):
        top, left = n // columns * height, n % columns * width
        canvas[top : top + height, left : left + width] = cell
    return Image.fromarray(canvas)


def cell(image: Image.Image, count: int, most: int) -> Image.Image:
    """A picture as one of `count` in a grid of at most `most` pixels: smaller, if that is needed."""
    share = (most / (image.width * image.height * count)) ** 0.5
    if share >= 1:
        return image
    return image.resize((max(1, int(image.width * share)), max(1, int(image.height * share))))


def labelled(image: UInt8[np.ndarray, "H W 3"], text: str, size: int) -> UInt8[np.ndarray, "{size+16} {size} 3"]:
    """uint8 `[H, W, 3]` resized to `size` x `size`, with a white strip above it that says `text`: `[size + 16, size, 3]`."""
    canvas = Image.new("RGB", (size, size + 16), "white")
    canvas.paste(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC), (0, 16))
    ImageDraw.Draw(canvas).text((3, 2), text, fill="black")
    return np.asarray(canvas)
