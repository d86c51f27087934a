"""The names that weights have in public files, and where their values lie in our trees.

A public matrix `[out, in]` (torch's order) is one leaf of ours, or several: rows or columns of it. Several public names may stand for
rows of the same matrix, as `to_q` does for the first third of `qkv`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

Span = tuple[int, int]  # [start, stop)


class Piece(NamedTuple):
    """What of a public tensor is a leaf of ours (of its `block`, where blocks are stacked): rows, and columns of a matrix; `turned`:
    the leaf has a matrix's inputs before its outputs, as kernels do."""

    leaf: str
    block: int | None
    rows: Span
    columns: Span | None
    turned: bool = True


class Tensor(NamedTuple):
    """A public tensor, and the leaves that hold it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Module(NamedTuple):
    """What a public name stands for: those `rows` of the tensors `weight` and `bias`, in this order; `columns`: 0 for vectors."""

    weight: str
    bias: str | None
    rows: tuple[Span, ...]
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its weight."""
        count = sum(stop - start for start, stop in self.rows)
        return (count, self.columns) if self.columns else (count,)


class Names:
    """The tensors and the modules of one component, put together name by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.modules: dict[str, Module] = {}

    @cached_property
    def flat(self) -> dict[str, str]:
        """Names of modules with `_` for each dot -> those names."""
        return {name.replace(".", "_"): name for name in self.modules}

    def linear(
        self,
        name: str,
        leaves: Mapping[str, int],
        other: int,
        *,
        block: int | None = None,
        bias: bool = True,
        columns: bool = False,
    ) -> None:
        """A Linear under its public `name`. `leaves`: path -> its rows, or with `columns` its columns; `other`: the other size."""
        ends = [0]
        for size in leaves.values():
            ends.append(ends[-1] + size)
        spans = list(zip(ends[:-1], ends[1:], strict=True))
        out, in_ = (other, ends[-1]) if columns else (ends[-1], other)
        whole = [((0, out), span) if columns else (span, (0, in_)) for span in spans]
        pieces = tuple(Piece(f"{path}/kernel", block, *area) for path, area in zip(leaves, whole, strict=True))
        self.tensors[f"{name}.weight"] = Tensor((out, in_), pieces)
        if bias:  # of leaves side by side, the last has it
            held = [(list(leaves)[-1], (0, out))] if columns else list(zip(leaves, spans, strict=True))
            biases = tuple(Piece(f"{path}/bias", block, rows, None) for path, rows in held)
            self.tensors[f"{name}.bias"] = Tensor((out,), biases)
        self.modules[name] = Module(f"{name}.weight", f"{name}.bias" if bias else None, ((0, out),), in_)

    def table(self, name: str, leaf: str, rows: int, columns: int) -> None:
        """A lookup table `[rows, columns]` under its public `name`."""
        self.tensors[f"{name}.weight"] = Tensor((rows, columns), (Piece(leaf, None, (0, rows), (0, columns), False),))
        self.modules[name] = Module(f"{name}.weight", None, ((0, rows),), columns)

    def norm(self, name: str, leaf: str, width: int, *, block: int | None = None, bias: bool = False) -> None:
        """A norm's scale under its public `name`, and its bias."""
        for kind, ours in (("weight", "scale"), ("bias", "bias"))[: 2 if bias else 1]:
            self.tensors[f"{name}.{kind}"] = Tensor((width,), (Piece(f"{leaf}/{ours}", block, (0, width), None),))
        self.modules[name] = Module(f"{name}.weight", f"{name}.bias" if bias else None, ((0, width),), 0)

    def alias(self, name: str, of: str, *rows: Span) -> None:
        """Another name of a module, or of some of its rows."""
        module = self.modules[of]
        self.modules[name] = module._replace(rows=rows or module.rows)


class Prefix(NamedTuple):
    """What stands in front of a component's names; `flat`: `_` stands in them for each dot."""

    text: str
    component: str
    flat: bool = False


class PublicNames(NamedTuple):
    """The names of a backbone family. `prefixes`: the first that fits wins; `headers`: component -> its name in settings that a file's
    header holds; `others`: (regular expression of a name, the model that has such names); `wider`: module -> what a file is that
    gives it more inputs."""

    family: str
    components: Mapping[str, Names]
    prefixes: tuple[Prefix, ...]
    headers: Mapping[str, str]
    others: tuple[tuple[str, str], ...]
    wider: Mapping[str, str]
