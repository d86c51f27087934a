"""Datasets and caches of features in parts, on one host or several, which are then joined.

Parts lie in a hidden folder beside the one that is made. What is finished stays there until that is whole, so that a run which was
stopped does only what is left. Those of `train.prepare` are small datasets, made by several processes; a run which found bad rows
does again what has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import secrets
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from dynaip_jax.data.check import BadRow, Limits, Picture, Row, check
from dynaip_jax.data.children import follow_parent
from dynaip_jax.data.records import ROWS_A_SHARD, Record, write_dataset
from dynaip_jax.data.sources import Source
from dynaip_jax.errors import UserError, reason
from dynaip_jax.reading import parse_json
from dynaip_jax.storage.folders import AnyPath
from dynaip_jax.storage.locks import hold
from dynaip_jax.storage.renames import sync, sync_tree

PART = "part.json"  # in a part's folder: what it was made of, how many rows it has, and its bad ones
VERSION = 1
MAKING = ".making"  # ends the name of a part's folder until it is whole


class Share(NamedTuple):
    """What one of several hosts does: every `hosts`-th part from `number`, which counts from 1."""

    number: int
    hosts: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """ "2/8" -> the second of eight. Raises `UserError` for anything else."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UserError(f"`share` {text}: expected I/N, such as 2/8 on the second of eight hosts")
        return cls(int(number), int(count))

    def has(self, part: int) -> bool:
        """Whether the part of this number, from 0, is for this host."""
        return part % self.hosts == self.number - 1


class Part(NamedTuple):
    """A finished part: its folder, how many rows it holds, and what is wrong with those that are left out."""

    folder: Path
    written: int
    bad: list[BadRow]
    last: int  # number of its last row in the source


def folder_of(out: AnyPath) -> Path:
    """Where the parts of `out` lie until it is whole: beside it, or for a bucket in the system's temporary folder."""
    if isinstance(out, Path):
        whole = Path(os.path.abspath(out))
        return whole.with_name(f".{whole.name}.parts")
    return Path(tempfile.gettempdir()) / f"dynaip-{hashlib.sha256(os.fspath(out).encode()).hexdigest()[:16]}.parts"


@contextlib.contextmanager
def new_part(folder: Path) -> Iterator[Path]:
    """A new folder that becomes the part `folder`, in the place of what stands there, when the block ends well; what killed makers of
    it left goes. Raises `UserError` if another process makes it, and if it cannot be written."""

    def held(holder: str) -> UserError:
        return UserError(f"{folder}: this part is being made by {holder}; wait until that has ended, or stop it")

    try:
        with hold(folder.with_name(f"{folder.name}.lock"), held):
            for left in folder.parent.glob(f"{folder.name}.*{MAKING}"):
                shutil.rmtree(left, ignore_errors=True)
            work = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{MAKING}")
            work.mkdir()
            try:
                yield work
                sync_tree(work)
                shutil.rmtree(folder, ignore_errors=True)
                work.rename(folder)
                sync(folder.parent)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as e:
        raise UserError(
            f"`out`: {folder.parent} cannot be written ({reason(e)}); finished parts are kept there; free space, then the same command goes on"
        ) from e


def make_parts(
    source: Source, folder: Path, limits: Limits, processes: int, share: Share | None = None
) -> Iterator[Part]:
    """The parts of `source` in their order, made by `processes` processes or found finished; with `share` those of this host alone.

    Raises `UserError` if a process is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting: deque[Future[Part]] = deque()
    with _pool(processes) as pool:
        try:
            for number in itertools.count():
                rows = list(itertools.islice(source.rows, ROWS_A_SHARD))
                if not rows:
                    break
                if share is None or share.has(number):
                    waiting.append(pool.submit(make_part, rows, folder / f"part-{number:06d}", limits))
                while len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as e:
            raise UserError(
                f"`processes` {processes}: one was killed; finished parts are kept; expected enough memory for all; pass fewer, then the "
                "same command goes on"
            ) from e


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are gone when the block has ended: with all done if it ends well, else at once, whatever they are in."""
    context = multiprocessing.get_context("spawn")  # not forked: this process may have threads
    theirs, ours = context.Pipe(duplex=False)
    with theirs, ours:
        pool = ProcessPoolExecutor(processes, context, follow_parent, (theirs,))
        try:
            yield pool
            pool.shutdown()
        finally:
            ours.close()
            pool.shutdown()


def make_part(rows: list[Row | BadRow], folder: Path, limits: Limits) -> Part:
    """Checks and writes `rows`, unless `folder` already holds what comes of them."""
    key = _key(rows, limits)
    if (finished := _finished(folder, key, rows[-1].number)) is not None:
        return finished
    bad: list[BadRow] = []

    def good() -> Iterator[Record]:
        for row in rows:
            checked = row if isinstance(row, BadRow) else check(row, limits)
            if isinstance(checked, BadRow):
                bad.append(checked)
            else:
                yield checked

    with new_part(folder) as work:
        records = good()
        first = next(records, None)
        written = 0 if first is None else write_dataset(work, itertools.chain((first,), records), digests=True)
        (work / PART).write_text(json.dumps(dict(key=key, written=written, bad=bad)))
    return Part(folder, written, bad, rows[-1].number)


def _finished(folder: Path, key: str, last: int) -> Part | None:
    """The part in `folder`, if it was made with `key`."""
    try:
        stated = parse_json((folder / PART).read_bytes(), halves=True)
        if stated["key"] != key:
            return None
        return Part(folder, stated["written"], [BadRow(*row) for row in stated["bad"]], last)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(rows: list[Row | BadRow], limits: Limits) -> str:
    """A digest of the rows as the source states them, and of size and time of their files."""
    whole = hashlib.sha256(repr((VERSION, limits)).encode())
    for row in rows:
        whole.update(repr(row if isinstance(row, BadRow) else row._replace(target=None, reference=None)).encode())  # type: ignore[arg-type]  # None stands for pixels
        if isinstance(row, Row):
            for picture in (row.target, row.reference, *(() if row.mask is None else (Picture(row.mask),))):
                whole.update(repr((picture.path, picture.half, _state(picture))).encode())
    return whole.hexdigest()


def _state(picture: Picture) -> object:
    if picture.data is not None:
        return hashlib.sha256(picture.data).hexdigest()
    try:
        stat = os.stat(picture.path)
    except (OSError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns
