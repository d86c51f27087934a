"""The parameters of a run as a table, largest parts in detail."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax

from dynaip_jax.storage.bundle import flatten
from train.run import Run
from train.state import TrainState

LINES = 60  # at most; more parameters than that are summed up by the module that holds them


class Part(NamedTuple):
    """A parameter or a module: `leaves` by the rest of their names."""

    name: str
    leaves: dict[str, jax.Array]
    trained: bool
    decayed: Collection[str] = ()  # full names of parameters with weight decay, among others

    @property
    def size(self) -> int:
        return sum(math.prod(x.shape) for x in self.leaves.values())

    @property
    def state(self) -> str:
        """ "frozen", "trained", or that with how much of it is decayed."""
        if not self.trained:
            return "frozen"
        hits = [f"{self.name}.{name}".rstrip(".") in self.decayed for name in self.leaves]
        return "trained+decayed" if all(hits) else "trained+partly-decayed" if any(hits) else "trained"

    def children(self) -> list[Part]:
        """The parts one level down, in order of their names; none of a parameter."""
        below: dict[str, dict[str, jax.Array]] = {}
        for path, x in self.leaves.items():
            first, _, rest = path.partition(".")
            if first:
                below.setdefault(first, {})[rest] = x
        return [Part(f"{self.name}.{first}", leaves, self.trained, self.decayed) for first, leaves in below.items()]


def overview(run: Run, state: TrainState) -> str:
    """Lines of name, shape, dtype, sharding (on several devices) and number of parameters, what is trained first, with a mark on
    what has weight decay."""
    decayed = run.constants.decayed if run.config.optim.weight_decay else ()
    parts = [Part(name, flatten(params), True, decayed) for name, params in state.params.items()]
    parts += [Part(name, flatten(params), False) for name, params in run.frozen.items()]
    totals = {trained: sum(part.size for part in parts if part.trained == trained) for trained in (True, False)}
    total = f"parameters: {totals[True]:,} trained, {totals[False]:,} frozen"
    rows = [_row(part, split=run.mesh.devices.size > 1) for part in in_detail(parts, LINES - 1)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([total, *(f"  {line}" for line in lines)])


def in_detail(parts: list[Part], lines: int) -> list[Part]:
    """`parts`, with the largest trained ones replaced by their children as long as there are at most `lines`."""
    parts, whole = list(parts), set()
    while candidates := [p for p in parts if p.trained and p.name not in whole and "" not in p.leaves]:
        largest = max(candidates, key=lambda part: part.size)
        place, children = parts.index(largest), largest.children()
        if len(parts) + len(children) - 1 <= lines:
            parts[place : place + 1] = children
        else:
            whole.add(largest.name)
    return parts


def _row(part: Part, *, split: bool) -> tuple[str, ...]:
    """Cells: name, shape, dtype, sharding, size, trained, decayed or frozen."""
    arrays = list(part.leaves.values())
    shape = " x ".join(map(str, arrays[0].shape)) if "" in part.leaves else f"{len(arrays)} arrays"
    dtypes = ", ".join(sorted({str(x.dtype) for x in arrays}))
    shardings = {_axes(x) for x in arrays}
    sharding = (shardings.pop() if len(shardings) == 1 else "several") if split else ""
    return part.name, shape, dtypes, sharding, f"{part.size:,}".rjust(15), part.state


def _axes(x: jax.Array) -> str:
    """ "-, fsdp, tensor": the mesh axes along which each axis of an array is split."""
    spec: Mapping | Any = getattr(x.sharding, "spec", ())
    axes = [*spec, *[None] * (x.ndim - len(spec))]
    return ", ".join("-" if axis is None else axis if isinstance(axis, str) else "+".join(axis) for axis in axes)
