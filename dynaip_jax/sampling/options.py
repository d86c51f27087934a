"""Every option of a generation, written down once: default, range, description and check.

The command line, `DynaIPPipeline.__call__`, the settings in PNG files, the evaluator and the trainer's sample grids all take a
`SampleOptions`. Imports neither JAX nor NumPy, so that commands can show it at once.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

from dynaip_jax import choices
from dynaip_jax.errors import UserError

TRUE_CFG = 4.0  # scale used with a negative prompt when none is given
SEEDS = 2**32
LARGEST = 1e6  # of a number with a fraction, in size; beyond, single precision has no place for what is made of it
MOST = 10_000  # pictures of a call, and steps of a picture
LONGEST = 16_384  # pixels of a picture's side
Gain = float | tuple[float, ...]
Levels = tuple[float, float, float]


def option(default: Any, kind: str, doc: str, *, unit: str = "N", reference: bool = False, **limits: Any) -> Any:
    """A field: its default, one of `KINDS`, its description; `unit`: what a value is called in help; `reference`: whether it acts on
    reference pictures; `limits`: `least`, `most`, `above`, `choices`."""
    return dataclasses.field(
        default=default, metadata=dict(kind=kind, doc=doc, unit=unit, reference=reference, **limits)
    )


@dataclass(frozen=True)
class SampleOptions:
    """How pictures are made. None stands for the model's own default. Raises `UserError` for a value of another type or out of
    range; numbers of NumPy become Python's own."""

    negative_prompt: str | None = option(
        None, "text", "what to steer away from (true CFG: two passes a step)", unit="TEXT"
    )
    true_cfg: float | None = option(
        None, "number", "scale of true CFG (default: the model's own, if any; else 4 with a negative prompt)", unit="X"
    )
    height: int | None = option(None, "count", "multiple of 16", unit="PX", most=LONGEST)
    width: int | None = option(None, "count", "multiple of 16", unit="PX", most=LONGEST)
    steps: int | None = option(None, "count", "denoising steps", least=1, most=MOST)
    guidance: float | None = option(None, "number", "embedded guidance scale (dev models)", unit="X")
    seed: int | None = option(None, "count", "image k uses seed N + k (default 0)")
    num_images: int | None = option(None, "count", "pictures a prompt", least=1, most=MOST)
    at_once: int | None = option(
        None, "count", "pictures made at once (default: all, or as many as the memory holds)", least=1, most=MOST
    )
    cache_threshold: float | None = option(
        None,
        "number",
        "First Block Cache: steps whose first block changes less than X take the other blocks' share from before: faster, at an "
        "error (default: off)",
        unit="X",
        above=0,
    )
    regions: Literal["auto", "none"] | None = option(
        None,
        "text",
        "where each subject may appear: from its words, or everywhere (default: auto with words; masks win)",
        reference=True,
        choices=choices.REGIONS,
    )
    fit: Literal["pad", "crop", "stretch"] = option(
        "pad", "text", "how a reference that is not square becomes so", reference=True, choices=choices.FITS
    )
    image_scale: Gain = option(
        1.0, "numbers", "strength in the image branch, for all subjects or one each (0 = off)", unit="X", reference=True
    )
    text_gain: Gain = option(
        0.0, "numbers", "strength in the text branch, for all subjects or one each (0 = DDS)", unit="X", reference=True
    )
    block_scale: tuple[float, ...] | None = option(
        None,
        "numbers",
        "factors of both strengths, one for each block that the adapter acts in, double blocks first (default: 1 in all)",
        unit="X",
        reference=True,
    )
    granularity: Levels | tuple[Levels, ...] | None = option(
        None,
        "numbers",
        "weights of CLIP's low, middle and high level in place of the router's",
        unit="LOW MID HIGH",
        reference=True,
    )
    merge: Literal["sum", "concat"] | None = option(
        None,
        "text",
        "several subjects: add them up, or let them compete (default: the adapter's)",
        reference=True,
        choices=choices.MERGES,
    )
    image_start: float = option(0.0, "number", "share of steps before the reference acts", unit="F", reference=True)
    image_end: float = option(1.0, "number", "share of steps after which it no longer acts", unit="F", reference=True)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not None:
                value = KINDS[f.metadata["kind"]](f.name, value)
                _check_limits(f.name, value, f.metadata)
                object.__setattr__(self, f.name, value)
            elif f.default is not None:
                raise UserError(f"`{f.name}` None: expected a value, such as {f.default}; leave it out for that")
        for name in ("image_scale", "text_gain"):
            if isinstance(gain := getattr(self, name), tuple) and not _is_flat(gain):
                raise UserError(f"`{name}` {shown(gain)}: expected one number, or one for each reference")
        if self.block_scale is not None and not _is_flat(self.block_scale):
            raise UserError(f"`block_scale` {shown(self.block_scale)}: expected numbers, one for each block")
        _check_granularity(self.granularity)
        if not 0 <= self.image_start < self.image_end <= 1:
            raise UserError(
                f"`image_start` {self.image_start} `image_end` {self.image_end}: expected 0 <= start < end <= 1"
            )

    def check_gains(self, references: int) -> None:
        """Raises `UserError` unless gains and rows of granularity are one, or one for each of the `references`."""
        for name in ("image_scale", "text_gain"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if len(values) not in (1, references):
                raise UserError(f"`{name}` {value}: expected one number, or one for each of {references} references")
        rows = self.granularity or ()
        if rows and isinstance(rows[0], tuple) and len(rows) not in (1, references):
            raise UserError(
                f"`granularity`: {len(rows)} rows; expected one, or one for each of {references} references"
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
        if negative is None and usual is None and scale not in (None, 1):
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
            raise UserError(f"`seed` {shown(first)}: expected a number from 0 to {SEEDS - count}")
        return [first + k for k in range(count)]


def reference_options() -> tuple[str, ...]:
    """Names of the options that act on reference pictures."""
    return tuple(f.name for f in dataclasses.fields(SampleOptions) if f.metadata["reference"])


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def texts(option: str, given: Any) -> list[str]:
    """One text or several as a list. Raises `UserError`, naming the option, for what is no text or holds bytes that are no UTF-8."""
    if isinstance(given, str):
        return [_text(option, given)]
    if isinstance(given, (bytes, Mapping, Set)) or not isinstance(given, Iterable):
        raise UserError(f"`{option}` {shown(given)}: expected text, or a list of texts")
    found = [_text(option, text, f" {n}") for n, text in enumerate(given, 1)]
    if len(found) > MOST:
        raise UserError(f"`{option}`: {len(found)} texts; expected at most {MOST}")
    return found


def _text(name: str, value: Any, which: str = "") -> str:
    if not isinstance(value, str):
        raise UserError(f"`{name}`{which} {shown(value)}: expected text")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"`{name}`{which}: not UTF-8 from character {e.start + 1} on; expected text; type it anew"
        ) from e
    return value


def _count(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as e:
        raise UserError(f"`{name}` {shown(value)}: expected a whole number") from e


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__") or getattr(value, "ndim", 0) != 0:
        raise UserError(f"`{name}` {shown(value)}: expected a number")
    try:
        number = value if isinstance(value, int) else float(value)
    except (TypeError, ValueError, OverflowError) as e:
        raise UserError(f"`{name}` {shown(value)}: expected a number") from e
    if not abs(number) <= LARGEST:
        raise UserError(f"`{name}` {shown(value)}: expected a finite number, at most {LARGEST:g} in size")
    return number


def _numbers(name: str, value: Any) -> Any:
    """A number, or sequences and arrays as tuples of numbers."""
    if isinstance(value, (str, bytes, Mapping, Set)) or not (
        hasattr(value, "__len__") or getattr(value, "ndim", 0) != 0
    ):
        return _number(name, value)
    items = value if isinstance(value, Sequence) else getattr(value, "tolist", lambda: value)()
    if not isinstance(items, Sequence):  # an array without axes
        return _number(name, items)
    if not 0 < len(items) <= MOST:
        raise UserError(f"`{name}`: {len(items)} numbers; expected at least one, and at most {MOST}")
    return tuple(_numbers(name, x) for x in items)


KINDS: dict[str, Callable[[str, Any], Any]] = dict(
    text=_text, count=_count, number=_number, numbers=_numbers
)  # of options: what makes a plain value of one


def shown(value: Any) -> str:
    """A value for a message: on one line, and not longer than a few words; its type, if it is no number or text."""
    kind = type(value).__name__
    try:
        text = str(value) if type(value) in (int, float, str) else f"{value!r} ({kind})"
    except ValueError:  # a number of thousands of digits
        text = f"({kind})"
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_limits(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    if "choices" in limits and value not in limits["choices"]:
        raise UserError(f"`{name}` {shown(value)}: expected {' or '.join(limits['choices'])}")
    if "least" in limits and value < limits["least"]:
        raise UserError(f"`{name}` {value}: expected at least {limits['least']}")
    if "most" in limits and value > limits["most"]:
        raise UserError(f"`{name}` {shown(value)}: expected at most {limits['most']}")
    if "above" in limits and value <= limits["above"]:
        raise UserError(f"`{name}` {value}: expected a positive number, such as 0.1")


def _is_flat(value: Any) -> bool:
    return isinstance(value, tuple) and not any(isinstance(x, tuple) for x in value)


def _check_granularity(value: Any) -> None:
    rows = () if value is None else value if isinstance(value, tuple) and isinstance(value[0], tuple) else (value,)
    for row in rows:
        levels = row if _is_flat(row) else ()
        if len(levels) != 3 or min(levels) < 0 or sum(levels) <= 0:
            raise UserError(
                f"`granularity` {shown(value)}: expected three non-negative numbers (low, mid, high), not all zero"
            )
