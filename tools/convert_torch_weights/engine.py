"""From named PyTorch tensors to a Flax parameter tree, by a table that uses every source tensor exactly once.

A table maps each leaf of our tree (a path such as "double_blocks/img_attn/qkv/kernel") to a `Leaf`, or to a list of
them, one a block, for leaves stacked by `nn.scan`. Each component has its table in a file of its own; this file checks
table, source and target against each other and copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dynaip_jax.errors import UserError, shortened
from dynaip_jax.storage import arena
from dynaip_jax.storage.manifest import BFLOAT16
from dynaip_jax.storage.pieces import NewLeaf
from dynaip_jax.storage.tensors import check_weights

SIDE = 128  # of the squares in which a matrix is transposed
SLICE = 1 << 18  # values looked at together


class Part(NamedTuple):
    """All of a source tensor (`shape` is the whole tensor's), or the rows [start, stop) of it along `axis`."""

    name: str
    shape: tuple[int, ...]
    axis: int = 0
    start: int = 0
    stop: int | None = None

    def read(self, tensors: Mapping[str, Any]) -> np.ndarray:
        if not self.shape:
            return np.asarray(tensors[self.name])
        part_of, rows = getattr(tensors, "part", None), slice(self.start, self.stop)
        if part_of is not None and self.axis == 0:
            return part_of(self.name, (rows,))
        return np.asarray(tensors[self.name])[(slice(None),) * self.axis + (rows,)]

    @property
    def rows(self) -> tuple[int, int]:
        return self.start, self.shape[self.axis] if self.stop is None else self.stop


class Leaf(NamedTuple):
    """The parts, concatenated along axis 0, then transposed by `axes` and reshaped to the leaf's shape."""

    parts: tuple[Part, ...]
    axes: tuple[int, ...] | None = None

    def build(self, tensors: Mapping[str, Any], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Raises `UserError` for what is not finite, in the source or in `dtype`."""
        read = [p.read(tensors) for p in self.parts]
        for part, x in zip(self.parts, read, strict=True):
            check_weights("weights", part.name, x.dtype)
            if not finite(x):
                raise UserError(
                    f"{part.name} holds NaN or infinity; expected finite weights; use another file, or download it again"
                )
        x = _joined(read) if len(read) > 1 else read[0]
        y = _laid(x, self.axes, dtype).reshape(shape)
        if y.dtype != x.dtype and not finite(y):
            raise UserError(
                f"{self.parts[0].name} holds values that {dtype} cannot; expected smaller ones; pass another `dtype`"
            )
        return y


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    rows, dtype = sum(len(x) for x in parts), np.result_type(*parts)
    return np.concatenate(parts, out=arena.empty((rows, *parts[0].shape[1:]), dtype))


Table = dict[str, Leaf | list[Leaf]]


def linear(path: str, *names: str, out: int, in_: int, bias: bool = True) -> Table:
    """A Linear: torch weight `[out, in_]` -> kernel `[in_, ...out]`. Several names are stacked along the output axis,
    each with out / len(names) rows."""
    each = out // len(names)
    table: Table = {f"{path}/kernel": Leaf(tuple(Part(f"{n}.weight", (each, in_)) for n in names), (1, 0))}
    if bias:
        table[f"{path}/bias"] = Leaf(tuple(Part(f"{n}.bias", (each,)) for n in names))
    return table


def conv(path: str, name: str, out: int, in_: int, size: int, bias: bool = True) -> Table:
    """A Conv2d: torch weight `[out, in_, size, size]` -> kernel `[size, size, in_, out]`."""
    table: Table = {f"{path}/kernel": Leaf((Part(f"{name}.weight", (out, in_, size, size)),), (2, 3, 1, 0))}
    if bias:
        table[f"{path}/bias"] = copy(f"{name}.bias", out)
    return table


def norm(path: str, name: str, width: int) -> Table:
    """A LayerNorm or GroupNorm: weight, bias `[width]` -> scale, bias."""
    return {f"{path}/scale": copy(f"{name}.weight", width), f"{path}/bias": copy(f"{name}.bias", width)}


def copy(name: str, *shape: int) -> Leaf:
    """A tensor taken as it is."""
    return Leaf((Part(name, shape),))


def stack(path: str, tables: list[Table]) -> Table:
    """The tables of equal blocks as one table of stacked leaves under `path`."""
    return {f"{path}/{leaf}": [t[leaf] for t in tables] for leaf in (tables[0] if tables else ())}  # type: ignore[misc]  # tables of blocks hold no lists


def abstract_params(init: Callable[..., Any], *inputs: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every parameter that `init(key, *inputs)` would make, without allocating any."""
    tree = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), *inputs))["params"]
    return flatten_dict(tree, sep="/")


def numbered(names: Iterable[str], prefix: str) -> int:
    """How many blocks `names` have under `prefix`, which their number follows: "blocks." has 2 with "blocks.0.a", "blocks.1.a".

    Raises `ValueError` if their numbers are not 0, 1, 2, ... without gaps.
    """
    numbers = {n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)}
    if stray := numbers - {str(n) for n in range(len(numbers))}:
        name = shortened(min(stray), 40)
        raise ValueError(
            f"{prefix}{name} among {len(numbers)} of {prefix}N: expected them numbered from 0, without gaps"
        )
    return len(numbers)


def source_shapes(table: Table) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every source tensor the table reads.

    Raises `AssertionError` if a table gives one tensor two shapes, or uses any row of it not exactly once.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    rows: dict[str, list[tuple[int, int]]] = {}
    for leaf in (leaf for entry in table.values() for leaf in (entry if isinstance(entry, list) else [entry])):
        for part in leaf.parts:
            assert shapes.setdefault(part.name, part.shape) == part.shape, f"{part.name}: two shapes in the table"
            rows.setdefault(part.name, []).append(part.rows if part.shape else (0, 1))
    for name, spans in rows.items():
        spans.sort()
        ends = [0, *(stop for _, stop in spans)]
        assert [start for start, _ in spans] == ends[:-1], f"{name}: rows {spans} are not used exactly once"
    return shapes


def check_names(component: str, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `UserError` with both sides if `stored` and `expected` (name -> shape) differ in any name or shape."""
    missing = [f"{n} {list(expected[n])}" for n in expected if n not in stored]
    unexpected = [f"{n} {list(stored[n])}" for n in stored if n not in expected]
    wrong = [
        f"{n}: found {list(stored[n])}, expected {list(s)}"
        for n, s in expected.items()
        if n in stored and tuple(stored[n]) != s
    ]
    problems = []
    for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong)):
        if names:
            problems.append(f"{len(names)} {label}: {shortened(names[0], 90)}{' ...' if len(names) > 1 else ''}")
    if problems:
        raise UserError(
            f"{component}: tensors do not match its config: {' | '.join(problems)}; use config and weights that belong together"
        )


def convert(
    component: str,
    tensors: Mapping[str, Any],
    table: Table,
    target: Mapping[str, jax.ShapeDtypeStruct],
    *,
    dtype: Any = None,
    lazily: bool = False,
    check_only: bool = False,
) -> dict[str, Any]:
    """The nested parameter tree of `target`'s shapes, read from `tensors` (name -> array, opened lazily or not).

    Each leaf has the source's precision unless `dtype` is given, and where blocks or parts of it have different ones, the least that
    holds them all. `check_only` compares names, shapes and dtypes, reads no tensor and returns an empty tree; `lazily` returns one of
    `NewLeaf`s instead, which are read later.
    Raises `UserError` for missing, unexpected, wrongly shaped or non-finite tensors, and for those of other than floating-point numbers.
    """
    expected = source_shapes(table)
    shape_of = getattr(tensors, "shape", lambda name: tuple(np.shape(tensors[name])))
    check_names(component, {name: shape_of(name) for name in tensors}, expected)
    assert set(table) == set(target), f"{component}: table and model differ: {sorted(set(table) ^ set(target))}"
    known = getattr(tensors, "dtype", lambda name: None)
    kinds = {name: known(name) for name in expected}
    if not check_only:
        kinds |= {name: np.asarray(tensors[name]).dtype for name, kind in kinds.items() if kind is None}
    for name, kind in kinds.items():
        if kind is not None:
            check_weights(component, name, kind)
    if check_only:
        return {}

    leaves = {}
    for path, entry in table.items():
        shape, stacked = target[path].shape, isinstance(entry, list)
        blocks: list[Leaf] = entry if isinstance(entry, list) else [entry]
        used = {kinds[part.name] for leaf in blocks for part in leaf.parts}
        wanted = np.dtype(dtype) if dtype else _widest(used)
        reads = tuple(
            partial(_read, component, leaf, tensors, shape[1:] if stacked else shape, wanted) for leaf in blocks
        )
        leaves[path] = NewLeaf(shape, wanted, reads, stacked)
    return unflatten_dict({path: leaf if lazily else leaf.value() for path, leaf in leaves.items()}, sep="/")


def _read(
    component: str, leaf: Leaf, tensors: Mapping[str, Any], shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    try:
        return leaf.build(tensors, shape, dtype)
    except UserError as e:
        raise UserError(f"{component}: {e.args[0]}") from e


def _widest(dtypes: Iterable[Any]) -> np.dtype:
    """The least precision that holds all of `dtypes`; of float16 and bfloat16 that is float32."""
    kinds = sorted({np.dtype(d) for d in dtypes}, key=lambda d: d.itemsize)
    return np.dtype(np.float32) if [d.itemsize for d in kinds] == [2, 2] else kinds[-1]


def finite(x: np.ndarray) -> bool:
    """Whether all values are, looked at a little at a time."""
    flat = x.reshape(-1) if x.flags.c_contiguous else x
    rows = max(1, SLICE // max(1, math.prod(flat.shape[1:]))) if flat.ndim else 1
    for start in range(0, len(flat) if flat.ndim else 1, rows):
        part = flat[start : start + rows] if flat.ndim else flat
        if part.dtype == BFLOAT16:
            if part.size and (part.view(np.uint16) & 0x7FFF).max() >= 0x7F80:  # the exponent of infinity and NaN
                return False
        elif not np.isfinite(part).all():
            return False
    return True


def _laid(x: np.ndarray, axes: tuple[int, ...] | None, dtype: np.dtype) -> np.ndarray:
    """`x` transposed by `axes`, as `dtype`, C-contiguous; matrices go square by square, each from a copy without the
    matrix's stride: rows that are a power of two apart share few lines of a cache."""
    if x.dtype == dtype == BFLOAT16:  # NumPy moves its own types faster
        return _laid(x.view(np.uint16), axes, np.dtype(np.uint16)).view(dtype)
    if axes != (1, 0):
        return np.ascontiguousarray(x if axes is None else x.transpose(axes), dtype)
    y = arena.empty(x.shape[::-1], dtype)
    for i in range(0, x.shape[0], SIDE):
        for j in range(0, x.shape[1], SIDE):
            y[j : j + SIDE, i : i + SIDE] = np.ascontiguousarray(x[i : i + SIDE, j : j + SIDE]).T
    return y
