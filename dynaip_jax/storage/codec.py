"""Frozen dataclasses as JSON, and back: one codec for every config on disk.

A field with `metadata=dict(stored=False)` stays out of files. Tuples become lists and come back as tuples; nested dataclasses
become objects. A field that a file lacks takes its default, so that files of older versions are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from dynaip_jax import schema

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """The stored fields of a dataclass instance, as JSON holds them."""
    return {f.name: _plain(getattr(config, f.name)) for f in _stored(type(config))}


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The `cls` that `to_dict` made `values` of. Raises `TypeError` for a name that is no stored field of it, `ValueError` for values
    of other types than the fields', and whatever `cls` raises for values that it refuses."""
    return schema.build(cls, values)


def _stored(cls: type) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(cls) if f.metadata.get("stored", True)]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(x) for x in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value
