"""Every option of a generation, written down once: default, range, description and check.

The command line, `DynaIPPipeline.__call__`, the settings in PNG files, the evaluator and the trainer's sample grids all take a
`SampleOptions`. Imports neither JAX nor NumPy, so that commands can show it at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dynaip_jax import choices
from dynaip_jax.errors import UserError

TRUE_CFG = 4.0  # scale used with a negative prompt when none is given
SEEDS = 2**32
Gain = float | tuple[float, ...]
Levels = tuple[float, float, float]


def option(default: Any, doc: str, *, unit: str = "N", reference: bool = False, **limits: Any) -> Any:
    """A field: its default and description; `unit`: what a value is called in help; `reference`: whether it acts on reference
    pictures; `limits`: `least`, `above`, `choices`."""
    return dataclasses.field(default=default, metadata=dict(doc=doc, unit=unit, reference=reference, **limits))


@dataclass(frozen=True)
class SampleOptions:
    """How pictures are made. None stands for the model's own default. Raises `UserError` for a value out of range."""

    negative_prompt: str | None = option(None, "what to steer away from (true CFG: two passes a step)", unit="TEXT")
    true_cfg: float | None = option(
        None, "scale of true CFG (default: the model's own, if any; else 4 with a negative prompt)", unit="X"
    )
    height: int | None = option(None, "multiple of 16", unit="PX", least=1)
    width: int | None = option(None, "multiple of 16", unit="PX", least=1)
    steps: int | None = option(None, "denoising steps", least=1)
    guidance: float | None = option(None, "embedded guidance scale (dev models)", unit="X")
    seed: int | None = option(None, "image k uses seed N + k (default 0)")
    num_images: int | None = option(None, "pictures a prompt", least=1)
    cache_threshold: float | None = option(
        None,
        "First Block Cache: steps whose first block changes less than X take the other blocks' share from before: faster, at an "
        "error (default: off)",
        unit="X",
        above=0,
    )
    regions: Literal["auto", "none"] | None = option(
        None,
        "where each subject may appear: from its words, or everywhere (default: auto with words; masks win)",
        reference=True,
        choices=choices.REGIONS,
    )
    fit: Literal["pad", "crop"] = option(
        "pad", "how a reference that is not square becomes so", reference=True, choices=choices.FITS
    )
    image_scale: Gain = option(
        1.0, "strength in the image branch, for all subjects or one each (0 = off)", unit="X", reference=True
    )
    text_gain: Gain = option(
        0.0, "strength in the text branch, for all subjects or one each (0 = DDS)", unit="X", reference=True
    )
    granularity: Levels | tuple[Levels, ...] | None = option(
        None,
        "weights of CLIP's low, middle and high level in place of the router's",
        unit="LOW MID HIGH",
        reference=True,
    )
    merge: Literal["sum", "concat"] | None = option(
        None,
        "several subjects: add them up, or let them compete (default: the adapter's)",
        reference=True,
        choices=choices.MERGES,
    )
    image_start: float = option(0.0, "share of steps before the reference acts", unit="F", reference=True)
    image_end: float = option(1.0, "share of steps after which it no longer acts", unit="F", reference=True)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, limits = getattr(self, f.name), f.metadata
            if value is None:
                continue
            if "choices" in limits and value not in limits["choices"]:
                raise UserError(f"`{f.name}` {value}: expected {' or '.join(limits['choices'])}")
            if "least" in limits and not value >= limits["least"] and f.name not in ("height", "width"):
                raise UserError(f"`{f.name}` {value}: expected at least {limits['least']}")
            if "above" in limits and not limits["above"] < value < math.inf:
                raise UserError(f"`{f.name}` {value}: expected a positive number, such as 0.1")
        for name in ("image_scale", "text_gain", "granularity"):
            object.__setattr__(self, name, _tuples(getattr(self, name)))
        _check_granularity(self.granularity)
        if not 0 <= self.image_start < self.image_end <= 1:
            raise UserError(
                f"`image_start` {self.image_start} `image_end` {self.image_end}: expected 0 <= start < end <= 1"
            )

    def check_gains(self, references: int) -> None:
        """Raises `UserError` unless gains are one finite number, or one for each of the `references`."""
        for name in ("image_scale", "text_gain"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if not all(map(math.isfinite, values)) or len(values) not in (1, references):
                raise UserError(
                    f"`{name}` {value}: expected one finite number, or one for each of {references} references"
                )

    def filled(self, defaults: Mapping[str, Any], *, multiple: int, takes_guidance: bool) -> SampleOptions:
        """The same with the model's `defaults` in place of None. `multiple`: pixels that heights and widths are multiples of.

        Raises `UserError` for sizes that are not, for guidance where the model takes none, and for a scale of true CFG without
        anything to steer away from.
        """
        sizes = {name: _first(getattr(self, name), defaults[name]) for name in ("height", "width")}
        for name, size in sizes.items():
            if size <= 0 or size % multiple:
                near = max(multiple, round(size / multiple) * multiple)
                raise UserError(f"`{name}` {size}: expected a positive multiple of {multiple}; try {near}")
        if self.guidance is not None and not takes_guidance:
            raise UserError(
                f"`guidance` {self.guidance}: this model has no guidance embedding; leave it out (or use `true_cfg`)"
            )
        negative, scale = self._true_cfg(defaults.get("true_cfg"))
        return dataclasses.replace(
            self,
            **sizes,
            steps=_first(self.steps, defaults["steps"]),
            guidance=_first(self.guidance, defaults["guidance"]) if takes_guidance else None,
            negative_prompt=negative,
            true_cfg=scale,
        )

    def _true_cfg(self, usual: float | None) -> tuple[str | None, float | None]:
        """The negative prompt and its scale, None without a second pass. `usual`: the scale that the model asks for, if any."""
        negative, scale = self.negative_prompt, self.true_cfg
        if negative is None and usual is None and scale is not None:
            raise UserError(
                f"`true_cfg` {scale}: needs something to steer away from; pass `negative_prompt` (it may be empty)"
            )
        if scale is None:
            scale = usual if usual is not None else None if negative is None else TRUE_CFG
        if scale is None or (scale == 1 and negative is None):
            return None, None
        return negative or "", scale

    def seeds(self) -> list[int]:
        """One a picture of a prompt: `seed`, `seed` + 1, ... Raises `UserError` if one of them is none."""
        first, count = self.seed or 0, self.num_images or 1
        if not 0 <= first <= SEEDS - count:
            raise UserError(f"`seed` {first}: expected a number from 0 to {SEEDS - count}")
        return [first + k for k in range(count)]


def reference_options() -> tuple[str, ...]:
    """Names of the options that act on reference pictures."""
    return tuple(f.name for f in dataclasses.fields(SampleOptions) if f.metadata["reference"])


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def _tuples(value: Any) -> Any:
    """Sequences and arrays as tuples of floats."""
    if value is None or isinstance(value, (int, float)):
        return value
    items = value if isinstance(value, Sequence) else value.tolist()
    return tuple(_tuples(x) for x in items) if isinstance(items, Sequence) else items


def _check_granularity(value: Any) -> None:
    rows = () if value is None else value if value and isinstance(value[0], tuple) else (value,)
    for row in rows:
        if len(row) != 3 or not all(math.isfinite(x) and x >= 0 for x in row) or sum(row) <= 0:
            raise UserError(
                f"`granularity` {list(value)}: expected three non-negative numbers (low, mid, high), not all zero"
            )
