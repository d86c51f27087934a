"""What the converter does with sources that fit: shows them, writes them piece by piece, or compares a bundle with them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynaip_jax import reading, tasks
from dynaip_jax.errors import UserError, printable
from dynaip_jax.interrupts import at_stake
from dynaip_jax.storage import checksums
from dynaip_jax.storage.arena import reused
from dynaip_jax.storage.bundle import Bundle, NewComponent
from dynaip_jax.storage.codec import to_dict
from dynaip_jax.storage.folders import replacing
from dynaip_jax.storage.manifest import BUNDLE_FILE, flatten, raw
from dynaip_jax.storage.pieces import NewLeaf, pieces
from dynaip_jax.version import __version__
from tools.convert_torch_weights.sources import Layout, Source

MIB = 1 << 20


class Planned(NamedTuple):
    """A component that fits: its source, the leaves that will be read of it, by name, and what `bundle.json` says of LoRAs in them."""

    source: Source
    leaves: dict[str, NewLeaf]
    merged: tuple[dict[str, Any], ...] = ()

    @property
    def bytes(self) -> int:
        return sum(leaf.bytes for leaf in self.leaves.values())


def plan(components: Mapping[str, Source], dtype: str) -> dict[str, Planned]:
    """Checks every name, shape and precision by headers alone. Raises `UserError` for what does not fit."""
    options: dict[str, Any] = {} if dtype == "keep" else dict(dtype=np.dtype(dtype))
    return {
        name: Planned(source, flatten(source.convert(source.tensors, source.config, lazily=True, **options)))
        for name, source in components.items()
    }


def table(planned: Mapping[str, Planned]) -> str:
    """A row for each component: tensors, parameters, size and precision as they are and will be, and where they come from."""
    rows = [("component", "tensors", "parameters", "GiB", "precision", "GiB written", "as", "from")]
    for name, part in planned.items():
        files, leaves = part.source.files, part.leaves.values()
        where = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
        rows.append(
            (
                name,
                str(len(part.source.tensors)),
                f"{sum(int(np.prod(x.shape)) for x in leaves):,}",
                f"{sum(f.stat().st_size for f in files) / 2**30:.3f}",
                getattr(part.source.tensors, "precision", None) or _dtypes(part.source.tensors),
                f"{part.bytes / 2**30:.3f}",
                "+".join(sorted({str(x.dtype) for x in leaves})),
                printable(where),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _dtypes(tensors: Mapping[str, Any]) -> str:
    kind = getattr(tensors, "dtype", lambda name: np.asarray(tensors[name]).dtype)
    return "+".join(sorted({str(kind(name)) for name in tensors}))


def key(planned: Mapping[str, Planned]) -> str:
    """Of all that decides what is written, in hexadecimal: a writer that was killed is gone on with by one that has the same."""
    facts: list[Any] = [__version__]
    for name, part in planned.items():
        files = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in part.source.files]
        leaves = [(leaf, x.shape, str(x.dtype)) for leaf, x in part.leaves.items()]
        facts.append((name, to_dict(part.source.config), files, leaves, *part.merged))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def converted(planned: Mapping[str, Planned]) -> Iterator[NewComponent]:
    """The components, one at a time."""
    for name, part in planned.items():
        print(f"{name}: converting", file=sys.stderr)
        yield NewComponent(name, to_dict(part.source.config), part.leaves, (*part.source.files, *part.merged))


@contextlib.contextmanager
def progress(text: str, planned: Mapping[str, Planned]) -> Iterator[Callable[[int], object]]:
    """Shows how much is done and how long the rest will take; its value is told of bytes."""
    done = 0
    with tasks.task(text, sum(part.bytes for part in planned.values()) // MIB, "MiB") as step:

        def count(more: int) -> None:
            nonlocal done
            before, done = done // MIB, done + more
            step(done // MIB - before)

        yield count


def verify(out: Path, family: str, planned: Mapping[str, Planned]) -> None:
    """Reads the sources again and raises `UserError` unless the bundle `out` holds just what they say, value by value."""
    bundle = Bundle.open(out, (family,))
    stated = bundle.manifest.get("checksums", {})
    with progress("comparing", planned) as step:
        for name, part in planned.items():
            entry = bundle.manifest["components"].get(name)
            if entry is None or entry["config"] != json.loads(json.dumps(to_dict(part.source.config))):
                found = "is not in it" if entry is None else "has other sizes in it"
                raise UserError(f"`out` {out}: {name} {found}; expected that of the sources; convert them again")
            checksums.verify(out, stated, name, BUNDLE_FILE, "convert the model again")
            _compare(out, name, part.leaves, stated, step)
            print(f"{name}: all {len(part.leaves)} arrays are as in the source")


def _compare(
    out: Path, component: str, leaves: Mapping[str, NewLeaf], stated: Mapping[str, str], step: Callable[[int], object]
) -> None:
    def digest(name: str, number: int) -> tuple[str, str, int]:
        with reused():
            x = np.ascontiguousarray(leaves[name].reads[number](), leaves[name].dtype)
            return f"{component}/{name}/{leaves[name].chunk(number)}", hashlib.sha256(raw(x)).hexdigest(), x.nbytes

    with contextlib.closing(pieces(leaves, digest)) as made:
        for name, (file, found, size) in made:
            if stated.get(file) != found:
                why = "is not as in the source" if file in stated else "is not there"
                raise UserError(
                    f"`out` {out}: {component}, {name} {why}; expected it as the converter writes it from these sources; "
                    "give the sources and the `dtype` that it was made with, or convert again"
                )
            step(size)


def export(paths: Sequence[Path], to: str, out: Path, layouts: Sequence[Layout], overwrite: bool) -> None:
    """Writes the bundle that is the one of `paths` as the folder `out` in a public layout. Raises `UserError` if it cannot be."""
    if len(paths) != 1 or not reading.is_dir(paths[0]):
        raise UserError(f"`source`: {len(paths)} sources; expected one bundle's folder with `to` {to}; pass that alone")
    bundle = Bundle.open(paths[0], [layout.family for layout in layouts])
    layout = next(layout for layout in layouts if layout.family == bundle.manifest["family"])
    if layout.back is None:
        raise UserError(
            f"`to` {to}: not written for the family {layout.family}; expected a bundle of another; keep it as it is"
        )
    with at_stake(f"nothing is written to {out}"), replacing(out, overwrite=overwrite, marks=layout.marks) as work:
        layout.back(bundle, to, work, print)
    print(f"wrote {out}")
