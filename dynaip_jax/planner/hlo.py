"""What a compiled program does, read off its text: exchanges between devices, matrix products and kernels, each as often as the
loops around it go round.

XLA's own cost analysis counts the body of a loop once; FLUX.1's blocks are loops, and on a TPU a product with a split matrix often is one
too (a ring, in which each device passes its part on).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
UNWRITTEN = (  # kinds that write nothing of their own
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id",
    "replica-id", "opt-barrier", "add-dependency", "domain",
)  # fmt: skip
CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.\-]+)")


class Counts(NamedTuple):
    """`collectives`: kind -> how many are run, and the bytes that a device receives in all; `product_flops`: of a device's matrix
    products and convolutions, 2 a multiply-add, without those that are calls of a library (cuBLAS on GPUs); `kernels`: runs of
    Pallas kernels on TPUs, whose products are not in `product_flops` either; `written_bytes`: that instructions write to a device's
    main memory (those that a TPU keeps in its vector memory are none); `copied_bytes`: those of them that are copies alone."""

    collectives: dict[str, dict[str, int]]
    product_flops: int
    kernels: int
    written_bytes: int
    copied_bytes: int


class Op(NamedTuple):
    """One instruction. `shape`: of its result, as written; `line`: all of it."""

    name: str
    shape: str
    kind: str
    operands: list[str]
    line: str


Ops = Mapping[str, Op]


def count(hlo: str) -> Counts:
    """Of a program's text, as from `Compiled.as_text()`."""
    computations = _parse(hlo)
    collectives: dict[str, dict[str, int]] = {}
    products = kernels = written = copied = 0

    def visit(ops: Ops, times: int, fused: bool) -> None:
        nonlocal products, kernels, written, copied
        started = {op.operands[0] for op in ops.values() if '"AsyncCollectiveStart"' in op.line}
        for op in ops.values():
            kind = op.kind.removesuffix("-start")
            if not fused:
                size, copy = _written(op, ops, computations)
                written += times * size
                copied += times * size * copy
            # a collective that runs beside fusions is written into each of them, and begins in one
            if kind in COLLECTIVES and (not fused or op.name in started):
                total = collectives.setdefault(kind, dict(count=0, bytes=0))
                total["count"] += times
                total["bytes"] += times * _received(kind, op)
            elif kind in ("dot", "convolution"):
                products += times * (_dot if kind == "dot" else _convolution)(op, ops)
            elif kind == "custom-call" and '"tpu_custom_call"' in op.line:
                kernels += times
            rounds = times * _rounds(op, ops, computations) if kind == "while" else times
            for name in CALLED.findall(op.line):
                visit(computations.get(name, {}), rounds, fused or kind == "fusion")

    visit(computations["ENTRY"], 1, False)
    return Counts(collectives, products, kernels, written, copied)


def _parse(hlo: str) -> dict[str, dict[str, Op]]:
    """Computation -> its instructions by name; the main computation is called ENTRY."""
    computations: dict[str, dict[str, Op]] = {}
    ops: dict[str, Op] = {}
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            ops = computations.setdefault("ENTRY" if head[1] else head[2], {})
        elif op := re.match(r"  (?:ROOT )?%?(\S+) = (.+?) ([a-z][\w\-]*)\((.*?)\)(?:,|$)", line):
            ops[op[1]] = Op(op[1], op[2], op[3], re.findall(r"%([\w.\-]+)", op[4]), line.strip())
    return computations


# --- loops


def _rounds(loop: Op, ops: Ops, computations: Mapping[str, Ops]) -> int:
    """How often a while loop goes round: as the compiler says, or from start, limit and step of the counter that its condition
    compares; 1 if it has none."""
    if trips := _groups(r'known_trip_count":\{"n":"(\d+)"', loop):
        return int(trips[0])
    called = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", loop.line))
    condition, body = computations[called["condition"]], computations[called["body"]]
    limits = [value for name in condition if (value := _constant(condition, name)) is not None]
    counters = [op for op in condition.values() if op.kind == "get-tuple-element" and re.match(r"[su]32\[\]", op.shape)]
    if not limits or not counters:
        return 1
    place = int(_groups(r"index=(\d+)", counters[0])[0])
    start = _constant(ops, ops[loop.operands[0]].operands[place]) or 0
    after = body[next(op for op in body.values() if op.line.startswith("ROOT")).operands[place]]
    steps = [value for name in after.operands if (value := _constant(body, name)) is not None]
    return max(1, math.ceil((max(limits) - start) / (steps[0] if steps and steps[0] > 0 else 1)))


def _constant(ops: Ops, name: str) -> int | None:
    """The whole number that an instruction is, seen through copies; None if it is none."""
    op = ops.get(name)
    if op is not None and op.kind in ("copy", "bitcast", "copy-done", "copy-start"):
        return _constant(ops, op.operands[0])
    match = op and re.search(r" [su]32\[\]\S* constant\((-?\d+)\)", op.line)
    return int(match[1]) if match else None


def _groups(pattern: str, op: Op) -> tuple[str, ...]:
    """The groups of `pattern` where it is in an instruction's line; none if it is not."""
    match = re.search(pattern, op.line)
    return match.groups() if match else ()


# --- sizes


def _arrays(shape: str) -> Iterator[tuple[int, list[int]]]:
    """Bits of an element, and dimensions, of each array in a shape."""
    for bits, dims in re.findall(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape):
        yield int(bits or 8), [int(n) for n in dims.split(",") if n]


def _in_main_memory(shape: str) -> list[int]:
    """Bytes of each array in a shape; 0 for those whose layout names another memory, as `S(1)` is a TPU's vector memory."""
    elsewhere = ["S(" in layout for layout in re.findall(r"\b(?:pred|[a-z]+\d+\w*)\[[\d,]*\](\{[^}]*\})?", shape)]
    return [
        0 if away else math.prod(dims) * bits // 8 for (bits, dims), away in zip(_arrays(shape), elsewhere, strict=True)
    ]


def _written(op: Op, ops: Ops, computations: Mapping[str, Ops]) -> tuple[int, bool]:
    """Bytes that an instruction, fused or not, writes to main memory, and whether it is a copy and nothing else. An update in place
    writes the part that it changes; of what runs beside others the start counts."""
    if op.kind in UNWRITTEN or op.kind.endswith("-done") or '"AllocateBuffer"' in op.line:
        return 0, False
    sizes = _in_main_memory(op.shape)
    if op.kind.endswith("-start"):  # a tuple of operands and result, of a copy of result and operand
        first = len(op.operands) if op.shape.startswith("(") and op.kind != "copy-start" else 0
        return sizes[first], op.kind == "copy-start"
    roots, inside = [op], ops
    if op.kind == "fusion":
        inside = computations[CALLED.findall(op.line)[0]]
        root = next(o for o in inside.values() if o.line.startswith("ROOT"))
        roots = [inside[name] for name in root.operands] if root.kind == "tuple" else [root]
    total = 0
    for size, root in zip(sizes, roots, strict=False):
        while root.kind == "bitcast":
            root = inside[root.operands[0]]
        part = inside.get(root.operands[1]) if root.kind == "dynamic-update-slice" else None
        total += size if part is None else min(size, sum(_in_main_memory(part.shape)))
    return total, all(root.kind == "copy" for root in roots)


def _dims(ops: Ops, name: str) -> list[int]:
    return next(_arrays(ops[name].shape))[1]


def _received(kind: str, op: Op) -> int:
    """Bytes that a device receives in one exchange; of a ring for all-reduce."""
    sizes = [math.prod(dims) * bits // 8 for bits, dims in _arrays(op.shape)]
    size = sum(sizes)
    if op.kind.endswith("-start") and op.shape.startswith("("):
        size = max(sizes)  # the tuple of an asynchronous start holds operand and result
    if kind == "all-reduce":
        return 2 * size
    if kind == "reduce-scatter":
        return size * math.prod(map(int, _groups(r"replica_groups=\[\d+,(\d+)\]", op)))
    return size


def _dot(op: Op, ops: Ops) -> int:
    sizes = _dims(ops, op.operands[0])
    joined = [sizes[int(d)] for axes in _groups(r"lhs_contracting_dims=\{([\d,]+)\}", op) for d in axes.split(",")]
    return 2 * math.prod(_dims(ops, op.name)) * math.prod(joined)


def _convolution(op: Op, ops: Ops) -> int:
    """Of the positions where the kernel meets the picture itself and not its padding: on TPUs plain products are convolutions too,
    whose batch axes are such windows."""
    picture, kernel, out = (_dims(ops, name) for name in (*op.operands[:2], op.name))
    picture_axes, kernel_axes, out_axes = _groups(r"dim_labels=(\w+)_(\w+)->(\w+)", op)
    options = dict(part.split("=") for window in _groups(r"window=\{(.*?)\}", op) for part in window.split())
    total = 2 * out[out_axes.index("b")] * out[out_axes.index("f")] * kernel[kernel_axes.index("i")]
    for d, axis in enumerate(sorted(c for c in out_axes if c.isdigit())):

        def option(name: str, usual: str, d: int = d) -> str:
            return options[name].split("x")[d] if name in options else usual

        low, stride = int(option("pad", "0_0").split("_")[0]), int(option("stride", "1"))
        apart, spread = int(option("lhs_dilate", "1")), int(option("rhs_dilate", "1"))
        end = (picture[picture_axes.index(axis)] - 1) * apart + 1
        taps, places = kernel[kernel_axes.index(axis)], out[out_axes.index(axis)]
        at = (place * stride + tap * spread - low for place in range(places) for tap in range(taps))
        total *= sum(0 <= x < end and x % apart == 0 for x in at)
    return total
