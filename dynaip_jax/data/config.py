"""What training reads and how it is augmented, and the picture shapes (buckets) that come of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from dynaip_jax.errors import UserError

PATH = dict(path=True)  # metadata of a field that says where something lies that is known by its content
SEEDS = 2**31 - 1  # the largest seed
MULTIPLE = 16  # pixels a side of one image token: 8 in the autoencoder, 2 in packing


class Bucket(NamedTuple):
    """Pictures of one shape: `height` x `width` pixels, named by the aspect ratio (width:height) it stands for."""

    name: str
    height: int
    width: int


@dataclass(frozen=True)
class DataConfig:
    """How training samples are read. Raises `UserError` for a value out of range."""

    path: str = field(default="", metadata=PATH)  # a folder written by `python -m train.prepare`
    features: str = field(
        default="", metadata=PATH
    )  # its features, by `python -m train.cache`; empty: encode while training
    also: tuple[str, ...] = field(default=(), metadata=PATH)  # more such folders, whose rows are added
    weights: tuple[float, ...] = ()  # how often an epoch takes the rows of `path` and of each of `also`; empty: once
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
        for name in ("flip_reference", "flip_target", "drop_image", "drop_text", "drop_both"):
            in_range(f"data.{name}", getattr(self, name), 0, 1)
        drops = round(self.drop_image + self.drop_text + self.drop_both, 9)
        in_range("data.drop_image` + `data.drop_text` + `data.drop_both", drops, 0, 1)
        in_range("data.crop_reference", self.crop_reference, 0.01, 1)
        in_range("data.clip_size", self.clip_size, 16, 4096)
        in_range("data.seed", self.seed, 0, SEEDS)
        in_range("data.workers", self.workers, 0, 256)
        in_range("data.prefetch", self.prefetch, 1, 256)
        if self.square not in ("pad", "crop"):
            raise UserError(f"`data.square` {self.square!r}: expected 'pad' or 'crop'")
        if self.weights and len(self.weights) != 1 + len(self.also):
            raise UserError(
                f"`data.weights` {self.weights}: {len(self.weights)} for {1 + len(self.also)} datasets; give one for `data.path` and one for each "
                "of `data.also`"
            )
        for weight in self.weights:
            in_range("data.weights", weight, 0, 1000, above=True)
        buckets(self.resolution, self.aspects)


def in_range(name: str, value: float, least: float, most: float = math.inf, *, above: bool = False) -> None:
    """Raises `UserError` for a value of the option `name` that is not from `least` (`above`: not beyond it) to `most`, is NaN or is
    infinite."""
    if not least <= value <= most or (above and value == least) or math.isinf(value):
        wanted = f"above {least}" if above else f"of at least {least}"
        if most < math.inf:
            wanted = f"above {least} and at most {most}" if above else f"from {least} to {most}"
        raise UserError(f"`{name}` {value}: expected a number {wanted}")


def buckets(resolution: int, aspects: Sequence[str]) -> tuple[Bucket, ...]:
    """One bucket an aspect ratio ("W:H"), of about `resolution` x `resolution` pixels, both sides multiples of 16.

    Raises `UserError` for a ratio that cannot be read or is beyond 4:1, a `resolution` below 64, and two ratios that
    come out at the same size.
    """
    if resolution < 64:
        raise UserError(f"`data.resolution` {resolution}: expected at least 64 pixels; choose a larger one")
    in_range("data.resolution", resolution, 64, 16384)
    shapes: dict[tuple[int, int], Bucket] = {}
    for name in aspects:
        match = re.fullmatch(r"([1-9][0-9]{0,3}):([1-9][0-9]{0,3})", name)
        ratio = int(match[1]) / int(match[2]) if match else 0
        if not 0.25 <= ratio <= 4:
            raise UserError(
                f"`data.aspects` {name!r}: expected width:height between 1:4 and 4:1, such as 3:2; correct it"
            )
        root = ratio**0.5
        size = (round(resolution / root / MULTIPLE) * MULTIPLE, round(resolution * root / MULTIPLE) * MULTIPLE)
        if size in shapes:
            raise UserError(
                f"`data.aspects` {name!r}: {size[1]} x {size[0]} pixels at resolution {resolution}, as {shapes[size].name!r}; "
                "expected different sizes; leave one of them out"
            )
        shapes[size] = Bucket(name, *size)
    if not shapes:
        raise UserError("`data.aspects`: none given; expected at least one, such as 1:1")
    return tuple(shapes.values())
