"""What the fields of a config may hold: the types that its dataclass declares, and ranges, checked before anything is built.

Every config that comes from a file passes here, from whichever kind of file.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union

SIZE = (1, 1 << 20)  # of a width, unless a config says otherwise
BLOCKS = (1, 1 << 10)  # of a number of layers
WORDS = (1, 1 << 24)  # of a vocabulary
EPSILON = (1e-12, 0.1)  # of a norm
LARGEST = 1 << 62
MOST_PARAMETERS = 1 << 38  # of one network: more than any known one of these kinds has


class AnyDataclass(Protocol):
    """An instance of any dataclass, for annotations."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


D = TypeVar("D", bound=AnyDataclass)


def typed(kind: Any, value: Any, name: str) -> Any:
    """`value`, as JSON or Python has it, as the annotation `kind`: lists become tuples, objects dataclasses where `kind` says so.

    Raises `ValueError` naming `name` for a value of another type, for NaN and infinity, and for numbers beyond 64 bits.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _either(inner, value, name)
    if origin is Literal:
        return _is(
            value in inner and type(value) in map(type, inner), value, name, f"one of {', '.join(map(str, inner))}"
        )
    if origin is tuple:
        return _tuple(inner, value, name)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value)  # type: ignore[arg-type]  # a class: annotations hold no instances
    if origin in (dict, Mapping):
        _is(isinstance(value, Mapping), value, name, "an object")
        return {key: typed(inner[1], x, f"{name}.{key}") for key, x in value.items()}
    if kind is int:
        return _is(type(value) is int and abs(value) < LARGEST, value, name, "a whole number")
    if kind is float:
        number = isinstance(value, float) or (type(value) is int and abs(value) < LARGEST)
        return float(_is(number and math.isfinite(value), value, name, "a finite number"))
    if kind in (str, bool, type(None)):
        what = {str: "text", bool: "true or false"}.get(kind, "nothing")
        return _is(isinstance(value, kind), value, name, what)
    return tuple(typed(Any, x, name) for x in value) if kind is Any and isinstance(value, list) else value


def check(config: Any, **ranges: tuple[float, float]) -> None:
    """Raises `ValueError`, naming the field, unless every field of the dataclass `config` is of its declared type and in its range.

    `ranges`: (least, most) by field, of numbers or of each number in a tuple; a whole number without one has `SIZE`.
    """
    cls: Any = type(config)
    for name, kind in hints(cls).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            continue  # it has checked itself
        whole = kind in (int, tuple[int, ...])
        least, most = ranges.get(name, SIZE if whole else (-math.inf, math.inf))
        if type(value) is int and value < least == 1:
            raise ValueError(f"{name} {value}: expected a whole number above 0")
        try:
            typed(kind, value, name)
        except ValueError as e:
            raise ValueError(f"{e} above 0" if whole and least == 1 else str(e)) from e
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, (int, float)) and not isinstance(x, bool) and not least <= x <= most:
                limit = f"at least {least}" if x < least else f"at most {most}"
                raise ValueError(f"{name} {_shown(value)}: expected {limit}")


def check_total(parameters: int) -> None:
    """Raises `ValueError` for a network of more `parameters` than `MOST_PARAMETERS`."""
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"sizes make {parameters:.3g} parameters: expected at most {MOST_PARAMETERS:.3g}")


@lru_cache(maxsize=256)
def hints(cls: type) -> dict[str, Any]:
    """The declared types of the stored fields of a dataclass."""
    kinds = typing.get_type_hints(cls)
    return {f.name: kinds[f.name] for f in dataclasses.fields(cls) if f.metadata.get("stored", True)}


def build(cls: type, values: Any) -> Any:
    """The dataclass `cls` of an object's `values`; a field that they lack takes its default.

    Raises `TypeError` for a name that is no stored field of it, `ValueError` for other types, and whatever `cls` raises.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{cls.__name__}: found {type(values).__name__}, expected an object")
    kinds = hints(cls)
    if unknown := sorted(map(str, values.keys() - kinds)):
        raise TypeError(f"unknown field {unknown[0]!r}; expected some of {', '.join(sorted(kinds))}")
    return cls(**{name: typed(kinds[name], value, name) for name, value in values.items()})


def _either(kinds: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    problem: Exception | None = None
    for kind in kinds:
        if kind is not type(None):
            try:
                return typed(kind, value, name)
            except ValueError as e:
                problem = problem or e
    raise ValueError(f"{problem}") from problem


def _tuple(inner: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    _is(isinstance(value, (list, tuple)), value, name, "a list")
    if inner[-1:] == (...,):
        return tuple(typed(inner[0], x, name) for x in value)
    _is(len(value) == len(inner), value, name, f"a list of {len(inner)}")
    return tuple(typed(kind, x, name) for kind, x in zip(inner, value, strict=True))


def _is(right: bool, value: Any, name: str, expected: str) -> Any:
    if not right:
        raise ValueError(f"{name} {_shown(value)}: expected {expected}")
    return value


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes out
        text = "a number of very many digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
