"""From a dataset on disk to training batches: what is read, how it is augmented, what is dropped.

Everything random about a sample is drawn from (seed, epoch, row), so that a batch depends on its step alone: not on how
many processes or workers make it, nor on what was read before.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from dynaip_jax import images
from dynaip_jax.data.order import Bucket, Plan, buckets
from dynaip_jax.data.records import Dataset, Record, open_dataset
from dynaip_jax.errors import UserError

if TYPE_CHECKING:
    from dynaip_jax.data.loader import BatchIterator


@dataclass(frozen=True)
class DataConfig:
    """How training samples are read. Raises `UserError` for a value out of range."""

    path: str = ""  # a folder written by `python -m train.prepare`
    features: str = ""  # its features, written by `python -m train.cache`; empty: encode while training
    resolution: int = 512  # pixels: targets have about resolution x resolution of them, in each bucket
    aspects: tuple[str, ...] = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")  # buckets, width:height
    clip_size: int = 224  # pixels a side of the reference
    square: Literal["pad", "crop"] = "pad"  # how the reference becomes square
    remove_background: bool = False  # of the reference, by its mask; every row needs one
    crop_reference: float = 0.8  # the smallest share of the reference's area that a random crop keeps; 1 = no crops
    flip_reference: float = 0.5  # probability
    flip_target: float = 0.0  # probability; captions that say left or right turn wrong
    drop_image: float = 0.05  # probability of no image prompt,
    drop_text: float = 0.05  # of the empty prompt,
    drop_both: float = 0.05  # of both; they exclude each other
    seed: int = 0
    workers: int = 2  # processes that prepare batches; 0 = threads of this one
    prefetch: int = 2  # batches ready ahead, for each worker

    def __post_init__(self) -> None:
        for field in ("flip_reference", "flip_target", "drop_image", "drop_text", "drop_both"):
            _in_range(field, getattr(self, field), 0, 1)
        drops = round(self.drop_image + self.drop_text + self.drop_both, 9)
        _in_range("drop_image + drop_text + drop_both", drops, 0, 1)
        _in_range("crop_reference", self.crop_reference, 0.01, 1)
        _in_range("clip_size", self.clip_size, 16, 4096)
        _in_range("seed", self.seed, 0, 2**31 - 1)
        _in_range("workers", self.workers, 0, 256)
        _in_range("prefetch", self.prefetch, 1, 256)
        if self.square not in ("pad", "crop"):
            raise UserError(f"data.square {self.square!r}: expected 'pad' or 'crop'")
        buckets(self.resolution, self.aspects)


def _in_range(field: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise UserError(f"data.{field} {value}: expected a number from {least} to {most}")


class Batch(NamedTuple):
    """One process's part of a global batch. H, W are the same on every process at the same step."""

    target: np.ndarray  # float32 [b, H, W, 3] in [-1, 1]
    reference: np.ndarray  # float32 [b, s, S, S, 3], normalised for CLIP; s = 1
    t5_ids: np.ndarray  # int32 [b, t]; of the empty prompt where the text is dropped
    clip_ids: np.ndarray  # int32 [b, t]
    keep_image: np.ndarray  # float32 [b]: 0 where the image prompt is dropped, otherwise 1
    row: np.ndarray  # int32 [b]: index into the dataset; `Dataset.numbers[row]` is the number in its source


class TextIds(Protocol):
    """Prompts to token ids; `dynaip_jax.families.tokenizers.Tokenizers` is one. Sent to worker processes, so it must be picklable."""

    def t5(self, texts: Sequence[str]) -> np.ndarray: ...

    def clip(self, texts: Sequence[str]) -> np.ndarray: ...


class Reader(Protocol):
    """Makes the arrays of given rows: `Pictures`, or anything that reads them precomputed. Must be picklable."""

    def read(self, rows: np.ndarray, bucket: Bucket, epoch: int) -> Any:
        """A NamedTuple of arrays `[b, ...]` for dataset indices `rows` `[b]`, a pure function of its arguments."""


class Draw(NamedTuple):
    """What chance decides about one row in one epoch."""

    drop_image: bool
    drop_text: bool
    flip_reference: bool
    flip_target: bool
    crop: tuple[
        float, float, float
    ]  # share of the reference's area kept; place of the crop, 0 = top / left, 1 = other end


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

    def read(self, rows: np.ndarray, bucket: Bucket, epoch: int) -> Batch:
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
        t5, clip = self.tokenizers.t5(captions), self.tokenizers.clip(captions)
        return Batch(target, reference, t5, clip, keep, np.asarray(rows, np.int32))


def pictures(record: Record, name: str, remove_background: bool) -> tuple[np.ndarray, np.ndarray]:
    """Target and reference of a record, uint8 `[H, W, 3]` each; `remove_background` puts CLIP's mean colour behind the
    subject. Raises `UserError`, naming the record by `name`, if a picture cannot be decoded or the mask is missing."""
    whole = images.load_image(name, data=record.target)
    source = images.load_image(name, data=record.reference) if record.reference else whole
    target, reference = (
        x[top:bottom, left:right]
        for x, (top, left, bottom, right) in ((whole, record.target_box), (source, record.reference_box))
    )
    if remove_background:
        if not record.mask:
            raise UserError(
                f"{name}: no mask to remove the background by; expected one; set data.remove_background False"
            )
        behind = np.array(images.NEUTRAL, np.float32)
        top, left, bottom, right = record.reference_box
        inside = images.load_image(name, data=record.mask)[top:bottom, left:right].astype(np.float32) / 255
        reference = np.round(behind + (reference - behind) * inside).astype(np.uint8)
    return target, reference


def cover(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The centre of uint8 `[H, W, 3]`, of the shape `height` x `width` and as large as fits, resized (Lanczos,
    antialiased) to float32 `[height, width, 3]` in [-1, 1]."""
    h, w = picture.shape[:2]
    scale = min(h / height, w / width)
    top, left = (h - height * scale) / 2, (w - width * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS, box)
    return np.asarray(resized, np.float32) / 127.5 - 1


def crop(picture: np.ndarray, area: float, down: float, along: float) -> np.ndarray:
    """The part of `[H, W, 3]` of the same shape with the share `area` of its pixels, at the place (`down`, `along`)."""
    h, w = picture.shape[:2]
    height, width = (max(1, round(side * math.sqrt(area))) for side in (h, w))
    top, left = round((h - height) * down), round((w - width) * along)
    return picture[top : top + height, left : left + width]


def make_plan(config: DataConfig, dataset: Dataset, global_batch: int) -> Plan:
    """The order in which the rows of `dataset` are trained on. Errors as in `Plan`; its warnings are given."""
    plan = Plan(dataset.sizes, buckets(config.resolution, config.aspects), global_batch, config.seed)
    for line in plan.warnings:
        warnings.warn(f"dataset {dataset.path}: {line}", stacklevel=2)
    return plan


def make_loader(
    config: DataConfig,
    tokenizers: TextIds,
    *,
    global_batch: int,
    positions: np.ndarray | None = None,
    encoders: str = "",
) -> BatchIterator:
    """An endless iterator of this process's `Batch` of each global batch, from step 0; its state is the step. With
    `config.features` it gives `CachedBatch`es, if they were made by the `encoders` of this identity.

    `positions` int `[b]`: which samples of each global batch this process reads; None = all.
    Raises `UserError` for a dataset that cannot be opened, one smaller than `global_batch`, and rows without mask if the
    background is to be removed.
    """
    from dynaip_jax.data.loader import BatchIterator

    if not config.path:
        raise UserError(
            "data.path: not given; expected a folder written by python -m train.prepare; pass --data.path DIR"
        )
    dataset = open_dataset(config.path)
    if config.remove_background and not dataset.masked.all():
        rows = dataset.numbers[~dataset.masked]
        raise UserError(
            f"data.remove_background: {len(rows)} of {len(dataset)} rows of {dataset.path} have no mask (row {rows[0]} is "
            "the first); expected a mask in every row; add them and prepare again, or leave the option out"
        )
    plan = make_plan(config, dataset, global_batch)
    reader: Reader = Pictures(dataset, config, tokenizers)
    if config.features:
        from dynaip_jax.data.features import Cached

        reader = Cached.open(config, dataset, plan, encoders)
    return BatchIterator(
        plan,
        reader,
        positions=np.arange(global_batch) if positions is None else positions,
        workers=config.workers,
        prefetch=config.prefetch,
    )
