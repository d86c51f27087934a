"""Frozen dataclasses as JSON, and back: one codec for every config on disk.

A field with `metadata=dict(stored=False)` stays out of files. Tuples become lists and come back as tuples; nested dataclasses
become objects. A field that a file lacks takes its default, so that files of older versions are read.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """The stored fields of a dataclass instance, as JSON holds them."""
    return {f.name: _plain(getattr(config, f.name)) for f in _stored(type(config))}


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The `cls` that `to_dict` made `values` of. Raises `TypeError` for a name that is no stored field of it, and whatever `cls`
    raises for values that it refuses."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{cls.__name__}: found {type(values).__name__}, expected an object")
    types = typing.get_type_hints(cls)
    stored = {f.name for f in _stored(cls)}
    if unknown := sorted(values.keys() - stored):
        raise TypeError(f"unknown field {unknown[0]!r}; expected some of {', '.join(sorted(stored))}")
    return cls(**{name: _typed(types[name], value) for name, value in values.items()})


def _stored(cls: type) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(cls) if f.metadata.get("stored", True)]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(x) for x in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _typed(kind: Any, value: Any) -> Any:
    options = [kind, *typing.get_args(kind)]
    config = next((x for x in options if isinstance(x, type) and dataclasses.is_dataclass(x)), None)
    if config is not None and value is not None:
        return from_dict(config, value)
    return tuple(_typed(None, x) for x in value) if isinstance(value, list) else value
