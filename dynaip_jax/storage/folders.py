"""Folders that appear whole or not at all, on a local disk or in a bucket (`gs://...`)."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import importlib.util
import itertools
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeAlias

from etils import epath

from dynaip_jax.errors import UserError
from dynaip_jax.interrupts import litter
from dynaip_jax.storage.locks import hold, holder_of
from dynaip_jax.storage.renames import exchange, move_new, sync, sync_tree

AnyPath: TypeAlias = Path | epath.Path
BUCKETS = ("gs://", "s3://")
UNFINISHED = ".dynaip-unfinished"  # in a folder of a bucket while it is written: what a kill leaves may be replaced


def as_path(text: str | os.PathLike[str]) -> AnyPath:
    """A path in a bucket as `epath.Path`, any other as `pathlib.Path`.

    Raises `UserError` for a bucket whose client is not installed.
    """
    text = os.fspath(text)
    scheme = next((s for s in BUCKETS if text.startswith(s)), None)
    if scheme is None:
        return Path(text)
    if importlib.util.find_spec("tensorflow") is None:
        _check_client(text, scheme.removesuffix("://"))
    return epath.Path(text)


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether `path` lies in a bucket, where nothing can be renamed or mapped into memory."""
    return os.fspath(path).startswith(BUCKETS)


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    marks: Sequence[str],
    field: str = "out",
    resume: str | None = None,
) -> Iterator[Path]:
    """A new empty local folder that becomes `path` when the block ends well, and disappears when it does not.

    A local folder is renamed once it is on the disk. A folder for a bucket is made in the system's temporary folder and copied, with
    the files named in `marks` last: one that holds none of them is not whole. What a killed writer of `path` left is removed first,
    but for the folder of one that was to write the same, by its key `resume` (hexadecimal): the block gets it as it is.

    Raises `UserError` if another process writes `path`, if it exists and `overwrite` is false, if it holds something else (it is no
    folder, or has none of the files `marks`), or if it cannot be written; the message names the option `field`. If something else
    appears at `path` while the block runs, it stays, and the error says where the new folder is.
    """
    path = as_path(path)
    _check_target(path, overwrite, marks, field)
    with _working(path, marks, field, resume) as work, litter(work):
        _check_target(path, overwrite, marks, field)  # once more: what a killed writer had moved aside may be back
        try:
            yield work
            if isinstance(path, epath.Path):
                _upload(work, path, overwrite, marks, field)
            else:
                sync_tree(work)
                _put(work, path, overwrite, marks, field)
        except OSError as e:
            where = f" in {work.parent}, or set TMPDIR to a folder on" if is_bucket(path) else " or choose"
            raise UserError(
                f"`{field}` {path}: writing failed ({e.strerror or e}); nothing was changed; free space{where} another disk"
            ) from e


def absolute(path: AnyPath) -> AnyPath:
    """`path` from the root of the disk. One in a bucket is that already; etils would look for it in the working folder."""
    return path if is_bucket(path) else path.absolute()


def wait_for_writer(path: Path) -> None:
    """Returns once no process writes the folder `path` by `replacing`."""
    while holder_of(_lock(_absolute(path))):
        time.sleep(0.2)


def copy_tree(source: AnyPath, target: AnyPath, last: Sequence[str] = ()) -> None:
    """Copies every file of the folder `source`; each folder may be in a bucket. Files named in `last` are copied last.

    Raises `UserError` for a link, or anything else that is neither folder nor file: a folder that someone else made could have any
    file of this machine copied through it.
    """
    if isinstance(source, Path) and source.is_symlink():
        raise _no_file(source)
    for file in sorted(_files(source), key=lambda file: file.name in last):
        copy_file(file, target / os.path.relpath(file, source))


def copy_file(source: AnyPath, target: AnyPath) -> None:
    """Copies a file, and makes the folders that it needs. Raises `UserError` if it is a link or no file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _opened(source) as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 24)


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """A local file or folder that holds what `path` does, for libraries that read no buckets: `path` itself if it is local,
    else a copy that disappears with the block."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        if path.is_dir():
            copy_tree(path, copy)
        else:
            copy.write_bytes(path.read_bytes())
        yield copy


def reserve(path: Path) -> None:
    """Allocates all blocks of a sparse file, where the system can: a full disk is an `OSError` now, not a crash when a
    memory map of it is written."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, path.stat().st_size)


def sha256_of(path: AnyPath) -> str:
    """sha256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _check_client(text: str, scheme: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class("gcs" if scheme == "gs" else scheme)
    except ImportError as e:
        package = {"gs": "gcsfs", "s3": "s3fs"}[scheme]
        raise UserError(f"{text}: buckets need {package}, which is not installed; pip install {package}") from e


def _check_target(path: AnyPath, overwrite: bool, marks: Sequence[str], field: str) -> None:
    """Raises `UserError` if `path` may not be written."""
    local = not isinstance(path, epath.Path)
    if not (os.path.lexists(path) if local else path.exists()):
        return
    if not overwrite:
        raise UserError(f"`{field}` {path}: already exists; choose another name or pass `overwrite`")
    if local and path.is_symlink():
        raise UserError(f"`{field}` {path}: is a link; expected a folder, or nothing; name the folder that it leads to")
    if local and not path.is_dir():
        raise UserError(f"`{field}` {path}: is no folder, and is not replaced by one; choose another name")
    if path.is_dir() and not _may_go(path, marks):
        raise UserError(
            f"`{field}` {path}: holds something else (there is no {' or '.join(marks)} in it); choose another name"
        )


def _may_go(path: AnyPath, marks: Sequence[str] = ()) -> bool:
    """Whether `path` is a folder, no link to one, that is empty or holds a file of `marks`, or that was left half written in a bucket;
    if no marks are given, whatever it holds."""
    if isinstance(path, Path):
        if path.is_symlink() or not path.is_dir():
            return False
    else:
        marks = (*marks, UNFINISHED) if marks else ()
    return not marks or not any(path.iterdir()) or any((path / mark).is_file() for mark in marks)


def _absolute(path: Path) -> Path:
    """`path` with a name, also if it was "." or ended in ".."; links stay."""
    return Path(os.path.abspath(path))


def _lock(target: Path) -> Path:
    """The file that the writer of `target` holds."""
    return target.with_name(f".{target.name}.lock")


def _new_folder(target: Path, mode: int = 0o700) -> Path:
    """A new folder beside `target` that belongs to its writer."""
    work = _part(target, secrets.token_hex(4))
    work.mkdir(mode)
    return work


def _part(target: Path, key: str) -> Path:
    return target.with_name(f".{target.name}.dynaip-{key[:8]}.part")


def _left(work: Path) -> bool:
    """Whether `work` is a folder of this user, no link to one."""
    try:
        facts = os.lstat(work)
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()


@contextlib.contextmanager
def _working(path: AnyPath, marks: Sequence[str], field: str, resume: str | None) -> Iterator[Path]:
    """The folder in which `path` is made, while no other process makes it."""

    def held(holder: str) -> UserError:
        return UserError(
            f"`{field}` {path}: is being written by {holder}; wait until that has ended, or choose another name"
        )

    if isinstance(path, Path):
        target = _absolute(path)
    else:  # made here, then copied there
        digest = hashlib.sha256(os.fspath(path).encode()).hexdigest()[:16]
        target = Path(tempfile.gettempdir()) / f"dynaip-{os.getuid()}-{digest}"
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold(_lock(target), held))
            mode = 0o777 if isinstance(path, Path) else 0o700
            if resume is None:
                _tidy(target, marks)
                work = _new_folder(target, mode)
            else:
                work = _part(target, resume)
                left = _left(work)
                _tidy(target, marks, keep=work if left else None)
                if not left:
                    work.mkdir(mode)
        except OSError as e:
            raise UserError(
                f"`{field}` {path}: cannot write there ({e.strerror}); choose a folder you may write to"
            ) from e
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        yield work


def _tidy(target: Path, marks: Sequence[str], keep: Path | None = None) -> None:
    """Removes what killed writers of `target` left beside it, but for `keep`; the caller holds its lock.

    What was half written goes, and an old folder that a new one has replaced. One that was moved aside, and whose place is empty,
    comes back.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.dynaip-[0-9a-f]{{8}}\.(part|old)")
    for path in sorted(target.parent.glob(f".{glob.escape(target.name)}.dynaip-*")):
        kind = pattern.fullmatch(path.name)
        if kind is None or path == keep:
            continue
        if kind[1] == "old" and not os.path.lexists(target):
            move_new(path, target)
        elif _may_go(path, marks if kind[1] == "old" else ()):
            shutil.rmtree(path, ignore_errors=True)


def _put(work: Path, path: Path, overwrite: bool, marks: Sequence[str], field: str) -> None:
    """Gives the finished folder `work` its name. What stands there is looked at again under a name that only this process knows, so
    that nothing goes which came meanwhile."""
    target = _absolute(path)
    if not overwrite or not os.path.lexists(target):
        try:
            move_new(work, target)
        except FileExistsError as e:
            raise _kept(work, path, field) from e
    else:
        _swap(work, target, marks, lambda: _kept(work, path, field))
    sync(target.parent)


def _swap(work: Path, target: Path, marks: Sequence[str], kept: Callable[[], UserError]) -> None:
    """Puts `work` in the place of `target`, which goes; raises `kept()` if `target` is not what may go."""
    if not _may_go(target, marks):
        raise kept()
    old = work.with_suffix(".old")
    work.rename(old)
    if exchange(old, target):
        if not _may_go(old, marks):
            exchange(old, target)
            old.rename(work)
            raise kept()
    else:  # two renames; `_tidy` puts right what a kill between them leaves
        old.rename(work)
        target.rename(old)
        try:
            if not _may_go(old, marks):
                raise FileExistsError
            move_new(work, target)
        except FileExistsError as e:
            with contextlib.suppress(FileExistsError):
                move_new(old, target)
            raise kept() from e
    old.rename(work)  # what is seen to be no longer needed has the name of such, also when half of it is gone
    shutil.rmtree(work, ignore_errors=True)


def _kept(work: Path, path: AnyPath, field: str) -> UserError:
    """Moves a finished folder to a free name beside `path`, whose own is taken; what is to be said of it."""
    numbers = itertools.count(1)
    while True:
        place = path.with_name(f"{path.name}-{next(numbers)}")
        try:
            if isinstance(place, Path):
                move_new(work, _absolute(place))
            elif place.exists():
                continue
            else:
                copy_tree(work, place)
        except FileExistsError:
            continue
        return UserError(
            f"`{field}` {path}: something else came there while this was written, and was left alone; what was written is whole in "
            f"{place}; rename it"
        )


def _upload(work: Path, path: epath.Path, overwrite: bool, marks: Sequence[str], field: str) -> None:
    """Copies a finished folder into a bucket, where nothing can be renamed: the old one goes first. What a kill leaves holds none of
    `marks`, and says that it is not finished."""
    try:
        _check_target(path, overwrite, marks, field)
    except UserError as e:
        raise _kept(work, path, field) from e
    state = "nothing was changed"
    try:
        (path / UNFINISHED).write_text("")
        state = "what lies there now is not whole"
        for mark in marks:  # first, so that what is left of an old folder is never taken for a whole one
            (path / mark).unlink(missing_ok=True)
        for entry in path.iterdir():
            if entry.name != UNFINISHED:
                entry.rmtree() if entry.is_dir() else entry.unlink()
        copy_tree(work, path, last=marks)
        (path / UNFINISHED).unlink()
    except Exception as e:  # each client of a bucket raises its own
        reason = " ".join(str(e).split())[:160] or type(e).__name__
        raise UserError(
            f"`{field}` {path}: writing failed ({reason}); {state}; check that you may write there, then write again with `overwrite`"
        ) from e


@contextlib.contextmanager
def _opened(path: AnyPath) -> Iterator[IO[bytes]]:
    """A file to read. Raises `UserError` if it is a link, or neither link nor file, whatever it was a moment ago."""
    if not isinstance(path, Path):
        with path.open("rb") as reader:
            yield reader
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        raise _no_file(path) from e
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_file(path)
    with os.fdopen(descriptor, "rb") as reader:
        yield reader


def _no_file(path: AnyPath) -> UserError:
    return UserError(
        f"{path}: a link, or no plain file; expected plain files and folders; put a copy there, or remove it"
    )


def _files(folder: AnyPath) -> Iterator[AnyPath]:
    for entry in sorted(folder.iterdir()):
        if isinstance(entry, Path) and entry.is_symlink():
            raise _no_file(entry)
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry
