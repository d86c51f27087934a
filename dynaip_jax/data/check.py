"""Source rows -> records: every picture of a row is decoded and measured."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dynaip_jax import images
from dynaip_jax.data.records import Record
from dynaip_jax.errors import UserError

STEP = 64  # halves of a Subjects200K picture are multiples of this; what is left is padding


class Picture(NamedTuple):
    """A picture file, or the `data` of one, of which the whole or one half counts."""

    path: Path
    data: bytes | None = None
    half: Literal["whole", "left", "right"] = "whole"


class Row(NamedTuple):
    """A row as the source states it, not yet checked."""

    number: int  # from 1: the line of the manifest, the row of the parquet files, the place in the sorted folder
    target: Picture
    reference: Picture
    caption: str
    subject: str = ""
    mask: Path | None = None


class BadRow(NamedTuple):
    """A row that cannot be used, and why, in one line."""

    number: int
    reason: str


@dataclass(frozen=True)
class Limits:
    """What a picture may measure: at least `min_side` pixels a side, at most `max_pixels` in the whole file. One whose
    shorter side has more than `shrink` pixels is reduced to that (None: none is)."""

    min_side: int = 64
    max_pixels: int = images.MAX_PIXELS
    shrink: int | None = None

    def __post_init__(self) -> None:
        if self.min_side < images.MIN_SIDE:
            raise UserError(f"`min_side` {self.min_side}: expected at least {images.MIN_SIDE}")
        if self.max_pixels < self.min_side**2:
            raise UserError(f"`max_pixels` {self.max_pixels}: expected at least `min_side` squared, {self.min_side**2}")
        if self.shrink is not None and self.shrink < self.min_side:
            raise UserError(f"`shrink` {self.shrink}: expected at least `min_side`, {self.min_side}")


def check(row: Row, limits: Limits) -> Record | BadRow:
    """Decodes every picture of a row. The record keeps the bytes of PNG and JPEG files as they are; files of other kinds
    become PNG, and those that are shrunk PNG or, if they were JPEG, JPEG of quality 95."""
    try:
        target, target_file = _load(row.target, limits)
        if row.reference.path == row.target.path:
            reference, reference_file = target, b""
        else:
            reference, reference_file = _load(row.reference, limits)
        target_box = _box(row.target, *_size(target, limits), limits)
        reference_box = _box(row.reference, *_size(reference, limits), limits)
        mask = b"" if row.mask is None else png(_shrunk(_mask(row.mask, *reference.shape[:2]), limits))
    except (UserError, OSError) as e:
        return BadRow(row.number, str(e))
    return Record(
        row.number, target_file, target_box, reference_file, reference_box, mask, row.caption.strip(), row.subject.strip()
    )  # fmt: skip


def png(picture: UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W"]) -> bytes:
    """A coloured or a grey picture as a PNG file."""
    return _encoded(picture, "PNG")


def _encoded(picture: np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return file.getvalue()


def _load(picture: Picture, limits: Limits) -> tuple[np.ndarray, bytes]:
    """The pixels as they are, and the file that stands for them in the dataset."""
    pixels = images.load_image(picture.path, max_pixels=limits.max_pixels, data=picture.data)
    file = picture.path.read_bytes() if picture.data is None else picture.data
    jpeg, small = file.startswith(b"\xff\xd8\xff"), _shrunk(pixels, limits)
    if small is not pixels and jpeg:
        return pixels, _encoded(small, "JPEG", quality=95, subsampling=0)
    return pixels, file if small is pixels and (jpeg or file.startswith(b"\x89PNG")) else png(small)


def _size(pixels: np.ndarray, limits: Limits) -> tuple[int, int]:
    """Height and width that `[H, W, ...]` has in the dataset."""
    height, width = pixels.shape[:2]
    if limits.shrink is None or min(height, width) <= limits.shrink:
        return height, width
    scale = limits.shrink / min(height, width)
    return round(height * scale), round(width * scale)


def _shrunk(pixels: np.ndarray, limits: Limits) -> np.ndarray:
    """uint8 `[H, W, 3]` or `[H, W]` in that size; the array itself if it has it."""
    size = _size(pixels, limits)
    if size == pixels.shape[:2]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.LANCZOS))


def _box(picture: Picture, height: int, width: int, limits: Limits) -> np.ndarray:
    """Top, left, bottom, right of the part that counts, of a picture of `height` x `width`."""
    top, left, bottom, right = 0, 0, height, width
    if picture.half != "whole":
        side = height // STEP * STEP
        if not side or width < 2 * side or width - 2 * side > 2 * STEP:
            raise UserError(
                f"{picture.path}: {width} x {height} pixels; expected two squares side by side with little padding; "
                "leave it out, or crop it"
            )
        top = (height - side) // 2
        left = top if picture.half == "left" else width - top - side
        bottom, right = top + side, left + side
    if min(bottom - top, right - left) < limits.min_side:
        raise UserError(
            f"{picture.path}: tiny, {right - left} x {bottom - top} pixels; expected at least {limits.min_side} a side; "
            "use a larger picture, or lower `min_side`"
        )
    return np.array((top, left, bottom, right), np.int32)


def _mask(path: Path, height: int, width: int) -> np.ndarray:
    size = images.load_image(path).shape[:2]
    if size != (height, width):
        raise UserError(
            f"{path}: a mask of {size[1]} x {size[0]} pixels; expected the reference's size, {width} x {height}; resize it"
        )
    return np.round(images.load_mask(path, height, width) * 255).astype(np.uint8)
