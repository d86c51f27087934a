"""Checksums of a checkpoint's files, written with it and looked at before it is read: tensorstore does not notice every damaged byte."""

from __future__ import annotations

import json
from pathlib import Path

from dynaip_jax.reading import parse_json
from dynaip_jax.storage.checksums import of_files
from dynaip_jax.storage.folders import AnyPath, sha256_of
from dynaip_jax.storage.renames import sync, sync_tree, write_new

CHECKSUMS = "checksums.json"
COMMITTED = (
    "commit_success.txt"  # Orbax's; in a bucket it is what ends a checkpoint, and says nothing of what was saved
)


def write_checksums(folder: AnyPath) -> None:
    """Writes `folder`/`CHECKSUMS` over all files below it, which it reads once more for that, and brings them onto the disk. Files at its top have none: Orbax writes
    them once more after this."""
    sums = {n: x if "/" in n else None for n, x in of_files(folder).items() if n.rpartition("/")[2] != COMMITTED}
    content = (json.dumps(sums, indent=1) + "\n").encode()
    if not isinstance(folder, Path):
        (folder / CHECKSUMS).write_bytes(content)
        return
    write_new(folder / CHECKSUMS, content)
    sync_tree(folder)
    sync(folder.parent)


def damage(folder: AnyPath) -> str | None:
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
