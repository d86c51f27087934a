"""From records to arrays: how pictures are augmented, and what is dropped.

Everything random about a sample is drawn from (seed, epoch, row), so that a batch depends on its step alone: not on how
many processes or workers make it, nor on what was read before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float32, Int, Int32, Shaped, UInt8
from PIL import Image

from dynaip_jax import images
from dynaip_jax.data.config import Bucket, DataConfig
from dynaip_jax.data.records import Dataset, Record
from dynaip_jax.errors import UserError


class Batch(NamedTuple):
    """One process's part of a global batch. H, W are the same on every process at the same step."""

    target: Float32[np.ndarray, "b H W 3"]  # in [-1, 1]
    reference: Float32[np.ndarray, "b s S S 3"]  # normalised for CLIP; s = 1
    ids: dict[str, Int32[np.ndarray, "b t"]]  # text encoder -> token ids; of the empty prompt where the text is dropped
    keep_image: Float32[np.ndarray, " b"]  # 0 where the image prompt is dropped, otherwise 1
    row: Int32[np.ndarray, " b"]  # index into the dataset; `Dataset.numbers[row]` is the number in its source


class TextIds(Protocol):
    """Prompts to token ids: the tokenizers of a family. Sent to worker processes, so it must be picklable."""

    def ids(self, texts: Sequence[str]) -> dict[str, Int32[np.ndarray, "b t"]]:
        """The ids that each text encoder takes, by its name."""


class Reader(Protocol):
    """Makes the arrays of given rows: `Pictures`, or anything that reads them precomputed. Must be picklable."""

    def read(self, rows: Int[np.ndarray, " b"], bucket: Bucket, epoch: int) -> Any:
        """A NamedTuple of arrays `[b, ...]` (or of tuples and dicts of them) for dataset indices `rows` `[b]`, a pure function of its arguments."""


class Draw(NamedTuple):
    """What chance decides about one row in one epoch."""

    drop_image: bool
    drop_text: bool
    flip_reference: bool
    flip_target: bool
    crop: tuple[
        float, float, float
    ]  # the share of the reference's area that is kept, and its place: 0 = top / left, 1 = other end


def draw(config: DataConfig, epoch: int, row: int) -> Draw:
    """The `Draw` of (seed, epoch, row). At most one of image, text and both is dropped."""
    u = np.random.default_rng((config.seed, epoch, row)).random(6)
    image, text, both = np.cumsum([config.drop_image, config.drop_text, config.drop_both])
    return Draw(
        drop_image=bool(u[0] < image or text <= u[0] < both),
        drop_text=bool(image <= u[0] < both),
        flip_reference=bool(u[1] < config.flip_reference),
        flip_target=bool(u[2] < config.flip_target),
        crop=(config.crop_reference + (1 - config.crop_reference) * u[3], u[4], u[5]),
    )


@dataclass(frozen=True)
class Pictures:
    """Decodes pictures and tokenises captions; see `Reader`."""

    dataset: Dataset
    config: DataConfig
    tokenizers: TextIds

    def read(self, rows: Int[np.ndarray, " b"], bucket: Bucket, epoch: int) -> Batch:
        """The `Batch` of dataset indices `rows` `[b]`. Raises `UserError` if a record is damaged."""
        b, size = len(rows), self.config.clip_size
        target = np.empty((b, bucket.height, bucket.width, 3), np.float32)
        reference = np.empty((b, 1, size, size, 3), np.float32)
        keep = np.ones(b, np.float32)
        captions = []
        for n, row in enumerate(rows):
            record, chance = self.dataset[int(row)], draw(self.config, epoch, int(row))
            whole, shown = pictures(record, f"{self.dataset.path} row {record.number}", self.config.remove_background)
            target[n] = cover(whole, bucket.height, bucket.width)[:, :: -1 if chance.flip_target else 1]
            shown = images.clip_pixels(crop(shown, *chance.crop), size, self.config.square)
            reference[n, 0] = shown[:, :: -1 if chance.flip_reference else 1]
            keep[n] = not chance.drop_image
            captions.append("" if chance.drop_text else record.caption)
        return Batch(target, reference, self.tokenizers.ids(captions), keep, np.asarray(rows, np.int32))


def pictures(
    record: Record, name: str, remove_background: bool
) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "h w 3"]]:
    """Target and reference of a record; `remove_background` puts CLIP's mean colour behind the
    subject. Raises `UserError`, naming the record by `name`, if a picture cannot be decoded or the mask is missing."""
    whole = images.load_image(name, data=record.target)
    source = images.load_image(name, data=record.reference) if record.reference else whole
    target, reference = _cut(whole, record.target_box, name), _cut(source, record.reference_box, name)
    if remove_background:
        if not record.mask:
            raise UserError(
                f"{name}: no mask to remove the background by; expected one; set `data.remove_background` False"
            )
        behind = np.array(images.NEUTRAL, np.float32)
        mask = images.load_image(name, data=record.mask)
        if mask.shape != source.shape:
            raise UserError(
                f"{name}: mask {mask.shape[:2]}, reference {source.shape[:2]}; expected one size; prepare the dataset again"
            )
        inside = _cut(mask, record.reference_box, name).astype(np.float32) / 255
        reference = np.round(behind + (reference - behind) * inside).astype(np.uint8)
    return target, reference


def _cut(picture: np.ndarray, box: np.ndarray, name: str) -> np.ndarray:
    """The part of a picture `[H, W, 3]` in a `box`. Raises `UserError` if that reaches beyond it."""
    top, left, bottom, right = map(int, box)
    height, width = picture.shape[:2]
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise UserError(
            f"{name}: box {[top, left, bottom, right]} in a picture of {width} x {height} pixels; expected top, left, bottom, right "
            "inside it; prepare the dataset again"
        )
    return picture[top:bottom, left:right]


def cover(picture: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> Float32[np.ndarray, "{height} {width} 3"]:
    """The centre of uint8 `[H, W, 3]`, of the shape `height` x `width` and as large as fits, resized (Lanczos,
    antialiased) to float32 `[height, width, 3]` in [-1, 1]."""
    h, w = picture.shape[:2]
    scale = min(h / height, w / width)
    top, left = (h - height * scale) / 2, (w - width * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS, box)
    return np.asarray(resized, np.float32) / 127.5 - 1


def crop(picture: Shaped[np.ndarray, "H W c"], area: float, down: float, along: float) -> Shaped[np.ndarray, "h w c"]:
    """The part of `[H, W, 3]` of the same shape with the share `area` of its pixels, at the place (`down`, `along`)."""
    h, w = picture.shape[:2]
    height, width = (max(1, round(side * math.sqrt(area))) for side in (h, w))
    top, left = round((h - height) * down), round((w - width) * along)
    return picture[top : top + height, left : left + width]
