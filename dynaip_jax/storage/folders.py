"""Folders that appear whole or not at all, on a local disk or in a bucket (`gs://...`)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from etils import epath

from dynaip_jax.errors import UserError

AnyPath: TypeAlias = Path | epath.Path
BUCKETS = ("gs://", "s3://")


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
    path: str | os.PathLike[str], *, overwrite: bool, marks: Sequence[str], field: str = "out"
) -> Iterator[Path]:
    """A new empty local folder that becomes `path` when the block ends well, and disappears when it does not.

    A local folder is renamed. A folder for a bucket is made in the system's temporary folder and copied, with the files
    named in `marks` last: one that holds none of them is not whole.

    Raises `UserError` if `path` exists and `overwrite` is false, if it holds something else (none of the files `marks`),
    or if it cannot be written; the message names the option `field`.
    """
    path = as_path(path)
    _check_target(path, overwrite, marks, field)
    make = _uploaded if isinstance(path, epath.Path) else _renamed
    with make(path, marks, field) as work:
        yield work


def copy_tree(source: AnyPath, target: AnyPath, last: Sequence[str] = ()) -> None:
    """Copies every file of the folder `source`; each folder may be in a bucket. Files named in `last` are copied last."""
    if isinstance(source, Path) and isinstance(target, Path):
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    for file in sorted(_files(source), key=lambda file: file.name in last):
        copy = target / os.path.relpath(file, source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as reader, copy.open("wb") as writer:
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


def sha256_of(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _check_client(text: str, scheme: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class("gcs" if scheme == "gs" else scheme)
    except ImportError as e:
        package = {"gs": "gcsfs", "s3": "s3fs"}[scheme]
        raise UserError(f"{text}: buckets need {package}, which is not installed; pip install {package}") from e


def _check_target(path: AnyPath, overwrite: bool, marks: Sequence[str], field: str) -> None:
    if path.exists() and not overwrite:
        raise UserError(f"`{field}` {path}: already exists; choose another name or pass `overwrite`")
    if path.is_dir() and any(path.iterdir()) and not any((path / f).is_file() for f in marks):
        raise UserError(
            f"`{field}` {path}: holds something else (there is no {' or '.join(marks)} in it); choose another name"
        )


@contextlib.contextmanager
def _renamed(path: Path, marks: Sequence[str], field: str) -> Iterator[Path]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as e:
        raise UserError(f"`{field}` {path}: cannot write there ({e.strerror}); choose a folder you may write to") from e
    try:
        yield work
        work.chmod(0o755)
        old = path.with_name(f"{work.name}.old")
        if path.exists():
            path.rename(old)
        work.rename(path)
        if old.is_dir():
            shutil.rmtree(old)
        elif old.exists():
            old.unlink()
    except OSError as e:
        raise UserError(
            f"`{field}` {path}: writing failed ({e.strerror or e}); nothing was changed; free space or choose another disk"
        ) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _uploaded(path: epath.Path, marks: Sequence[str], field: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        except OSError as e:
            raise UserError(
                f"`{field}` {path}: writing failed ({e.strerror or e}); nothing was changed; free space in {folder}, or set "
                "TMPDIR to a folder on another disk"
            ) from e
        try:
            for mark in marks:  # first, so that what is left of an old folder is never taken for a whole one
                (path / mark).unlink(missing_ok=True)
            path.rmtree(missing_ok=True)
            copy_tree(Path(folder), path, last=marks)
        except Exception as e:  # each client of a bucket raises its own
            reason = " ".join(str(e).split())[:160] or type(e).__name__
            raise UserError(
                f"`{field}` {path}: writing failed ({reason}); what lies there now is not whole; check that you may write "
                "there, remove it and write again"
            ) from e


def _files(folder: AnyPath) -> Iterator[AnyPath]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry
