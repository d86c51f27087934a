"""Checksums of a checkpoint's files, written with it and looked at before it is read: tensorstore does not notice every damaged byte."""

from __future__ import annotations

import json
from pathlib import Path

from dynaip_jax.reading import parse_json
from dynaip_jax.storage.folders import sha256_of
from dynaip_jax.storage.renames import sync, sync_tree, write_new

CHECKSUMS = "checksums.json"
EMPTY = "commit_success.txt"  # Orbax's; says nothing of what was saved


def write_checksums(folder: Path) -> None:
    """Writes `folder`/`CHECKSUMS` over all files below it, and brings them onto the disk. Files at its top have none: Orbax writes
    them once more after this."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != EMPTY:
            sums[path.relative_to(folder).as_posix()] = None if path.parent == folder else sha256_of(path)
    write_new(folder / CHECKSUMS, (json.dumps(sums, indent=1) + "\n").encode())
    sync_tree(folder)
    sync(folder.parent)


def damage(folder: Path) -> str | None:
    """The first file of a checkpoint that is not as it was written, and what is wrong with it; None if all are, or if it has no
    checksums, as those of older versions."""
    file = folder / CHECKSUMS
    if not file.is_file():
        return None
    try:
        sums = parse_json(file.read_bytes())
        for name, expected in sums.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if expected is not None and sha256_of(path) != expected:
                return f"{name} is damaged"
    except (OSError, ValueError, AttributeError) as e:
        return f"{CHECKSUMS} cannot be read ({str(e)[:80]})"
    return None
