"""A folder of compiled programs that a kill or a full disk has damaged. Reads files alone, no JAX."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

PROGRAM, USED, LOCK = "-cache", "-atime", ".lockfile"  # as JAX names its files
WHOLE = ".whole.json"  # name -> [bytes, time] of the programs that were found whole
AT_ONCE = 1 << 27  # bytes that are looked at in one start
ZSTD = b"\x28\xb5\x2f\xfd"  # how programs begin that are compressed otherwise than by zlib: they are left alone


def repair(folder: Path) -> None:
    """Removes programs of JAX's compilation cache that are cut short or damaged, which JAX would warn of at every run and never write
    anew, and puts right what would keep it from writing any other. Says what was removed. A folder that cannot be changed stays."""
    try:
        known = _known(folder)
        whole, suspects, read = {}, [], 0
        for path, size, changed in _programs(folder):
            stamp = [size, changed]
            if known.get(path.name) != stamp and read < AT_ONCE:
                read += size
                if not _is_whole(path):
                    suspects.append(path)
                    continue
                known[path.name] = stamp
            if known.get(path.name) == stamp:
                whole[path.name] = stamp
        if suspects or whole != _known(folder) or any(_unused(folder)):
            _change(folder, suspects, whole)
    except OSError:
        return


def _change(folder: Path, suspects: list[Path], whole: dict[str, list[int]]) -> None:
    """Removes what is damaged, unless another process uses the folder now, which may be just writing it."""
    with open(folder / LOCK, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        removed = [path for path in suspects if path.is_file() and not _is_whole(path)]
        for path in removed:
            path.unlink()
        for path in _unused(folder):
            if path.name.endswith(USED):
                path.unlink()
            else:  # JAX reads this of every program before it writes one
                _used(path).write_bytes(path.stat().st_mtime_ns.to_bytes(8, "little"))
        partial = folder / f"{WHOLE}.partial"
        partial.unlink(missing_ok=True)
        with open(partial, "x") as file:
            json.dump(whole, file)
        partial.replace(folder / WHOLE)
    if removed:
        print(f"{folder}: {len(removed)} damaged compiled programs removed; they are compiled again", file=sys.stderr)


def _programs(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """(path, bytes, time of the last change), those first that were changed last."""
    entries = [(e.stat().st_mtime_ns, e.stat().st_size, e.path) for e in os.scandir(folder) if e.name.endswith(PROGRAM)]
    for changed, size, path in sorted(entries, reverse=True):
        yield Path(path), size, changed


def _unused(folder: Path) -> list[Path]:
    """Programs without the time of their last use, and such times without a program."""
    names = {e.name: e for e in os.scandir(folder)}
    alone = [n for n in names if n.endswith(USED) and n.removesuffix(USED) + PROGRAM not in names]
    for name, entry in names.items():
        if name.endswith(PROGRAM):
            used = names.get(_used(Path(name)).name)
            if used is None or used.stat().st_size != 8:
                alone.append(entry.name)
    return [folder / name for name in alone]


def _used(program: Path) -> Path:
    return program.with_name(program.name.removesuffix(PROGRAM) + USED)


def _known(folder: Path) -> dict[str, list[int]]:
    try:
        known = json.loads((folder / WHOLE).read_bytes())
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _is_whole(path: Path) -> bool:
    """Whether a program can be decompressed; its checksum stands at its end."""
    stream = zlib.decompressobj()
    with open(path, "rb") as file:
        first = file.read(1 << 20)
        if first.startswith(ZSTD):
            return True
        try:
            stream.decompress(first)
            while not stream.eof and (part := file.read(1 << 20)):
                stream.decompress(part)
        except zlib.error:
            return False
    return stream.eof
