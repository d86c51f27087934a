"""Part of a source of tensors, under names without a prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dynaip_jax.errors import UserError


class Selection(Mapping[str, Any]):
    """The tensors whose name `keep` accepts, their names without `prefix`; the others are left out on purpose."""

    def __init__(self, tensors: Mapping[str, Any], keep: Callable[[str], bool] = lambda name: True, prefix: str = ""):
        self._tensors = tensors
        self._names = {n.removeprefix(prefix): n for n in tensors if keep(n)}
        if len(self._names) < len(kept := [n for n in tensors if keep(n)]):
            twice = next(n for n in kept if self._names[n.removeprefix(prefix)] != n)
            raise UserError(
                f"{twice}: stands with and without the prefix {prefix}; expected each tensor once; use another file"
            )

    def __getitem__(self, name: str) -> Any:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it where the source can tell."""
        name = self._names[name]
        shape_of = getattr(self._tensors, "shape", None)
        return shape_of(name) if shape_of else tuple(np.shape(self._tensors[name]))

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, of which no more is read where the source can do that."""
        part_of = getattr(self._tensors, "part", None)
        name = self._names[name]
        return part_of(name, index) if part_of else np.asarray(self._tensors[name])[index]

    def dtype(self, name: str) -> Any:
        """The dtype of a tensor, without reading it; None where the source cannot tell."""
        dtype_of = getattr(self._tensors, "dtype", None)
        return dtype_of(self._names[name]) if dtype_of else None


class Renamed(Selection):
    """The tensors of `names` (new name -> old) alone."""

    def __init__(self, tensors: Mapping[str, Any], names: Mapping[str, str]):
        self._tensors, self._names = tensors, dict(names)


def unprefixed(tensors: Mapping[str, Any], prefixes: Sequence[str]) -> Mapping[str, Any]:
    """`tensors` without those of `prefixes` that half of their names or more begin with, one after another.

    Raises `UserError` if a tensor stands with one and without it.
    """
    while prefix := next(
        (p for p in prefixes if 2 * sum(n.startswith(p) for n in tensors) >= max(1, len(tensors))), None
    ):
        tensors = Selection(tensors, prefix=prefix)
    return tensors


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, none of which is read where the source can tell."""
    shape_of = getattr(tensors, "shape", lambda name: tuple(np.shape(tensors[name])))
    return {name: shape_of(name) for name in tensors}
