"""Options that vary over a grid of pictures: "image_scale=0.2,0.6,1". Imports neither JAX nor NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from dynaip_jax.errors import UserError
from dynaip_jax.sampling.options import SampleOptions, shown

FIELDS = {f.name: f for f in dataclasses.fields(SampleOptions)}
ONE = ("num_images", "at_once")  # options that a cell, which is one picture, has no use for
SWEPT = tuple(name for name in FIELDS if name not in ONE)
MOST = 256  # pictures of a sweep
USUAL = "default"  # the word for an option's default


class Axis(NamedTuple):
    """An option and the values it takes, as `SampleOptions` has them; `words`: as they were given."""

    option: str
    values: tuple[Any, ...]
    words: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """A line for each value."""
        return [f"{self.option.replace('_', ' ')} {word}" for word in self.words]


def read_axis(text: str, asked: str) -> Axis:
    """The axis that `text` says: an option, "=", and values with commas between them; numbers of one value have colons ("1:0:0"), and
    "default" is the option's default. `asked`: the option that errors name. Raises `UserError` for what `SampleOptions` refuses."""
    name, sign, listed = text.partition("=")
    option = name.strip().lstrip("-").replace("-", "_")
    if option not in SWEPT:
        raise UserError(f"`{asked}` {shown(name)}: no option to vary; expected one of {', '.join(SWEPT)}")
    words = tuple(word.strip() for word in listed.split(","))
    if not sign or not all(words):
        raise UserError(f"`{asked}` {shown(text)}: expected values with commas between them, such as {option}=...,...")
    if len(set(words)) < len(words):
        raise UserError(f"`{asked}` {shown(text)}: a value is there twice; expected different ones; leave one out")
    return Axis(option, tuple(_value(option, word, asked) for word in words), words)


def _value(option: str, word: str, asked: str) -> Any:
    """What a word says. Raises `UserError`, by the name `asked`, for what the option does not take."""
    field = FIELDS[option]
    if word == USUAL:
        return field.default
    kinds: dict[str, Any] = dict(text=str, count=int, number=float, numbers=_numbers)
    try:
        value = kinds[field.metadata["kind"]](word)
        return getattr(SampleOptions(**{option: value}), option)
    except ValueError as e:
        unit = field.metadata["unit"]
        raise UserError(f"`{asked}` {option}={shown(word)}: expected {unit} for each value; correct it") from e
    except UserError as e:
        raise UserError(f"`{asked}` {option}={shown(word)}: {str(e).partition(': ')[2]}") from e


def _numbers(word: str) -> float | tuple[float, ...]:
    numbers = tuple(float(part) for part in word.split(":"))
    return numbers if len(numbers) > 1 else numbers[0]


def grid(base: SampleOptions, x: Axis, y: Axis | None) -> list[list[SampleOptions]]:
    """The options of each cell, rows along `y`, columns along `x`. Raises `UserError` for axes of one option, for too many cells, and for
    cells whose options do not fit each other."""
    rows: Sequence[dict[str, Any]] = [{}] if y is None else [{y.option: value} for value in y.values]
    if y is not None and x.option == y.option:
        raise UserError(f"`y` {y.option}: varies along x already; expected another option; change either")
    if len(rows) * len(x.values) > MOST:
        raise UserError(f"`x`: {len(rows)} x {len(x.values)} pictures; expected at most {MOST}; leave values out")
    return [[dataclasses.replace(base, **{x.option: value}, **row) for value in x.values] for row in rows]
