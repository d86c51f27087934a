"""Renames within a file system that replace nothing unasked, and what brings files onto the disk before they are renamed."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2  # of Linux's renameat2
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}  # an old kernel, or a file system without it


def move_new(source: Path, target: Path) -> None:
    """Renames `source` to `target`. Raises `FileExistsError` if there is something, also if it came a moment ago.

    Where the system has no such rename, a folder takes the place of an empty one that is made for it, which the system replaces only
    while it is empty, and a file gets a second name before it loses its first.
    """
    if _renameat2(source, target, _NOREPLACE):
        return
    if not stat.S_ISDIR(os.lstat(source).st_mode):
        os.link(source, target, follow_symlinks=False)
        os.unlink(source)
        return
    os.mkdir(target)
    try:
        os.rename(source, target)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target)) from e


def exchange(one: Path, other: Path) -> bool:
    """Swaps two entries in one step; False, with nothing done, where the system cannot."""
    return _renameat2(one, other, _EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    error = ctypes.get_errno()
    if error in _CANNOT:
        return False
    raise OSError(error, os.strerror(error), os.fspath(source), None, os.fspath(target))


def write_new(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all, in place of an older one if there is one.

    It is made under a hidden name of its own, never through a link that lies there, and is on the disk before it gets its name.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def partials(folder: Path) -> Iterator[Path]:
    """What killed writers of `write_new` left in `folder`."""
    for path in folder.glob(".*.partial"):
        if not path.is_dir():
            yield path


def sync(path: Path) -> None:
    """Returns once a file's content, or the names in a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        os.fsync(file)
    except OSError:
        if not path.is_dir():  # some systems sync no folders
            raise
    finally:
        os.close(file)


def sync_tree(folder: Path) -> None:
    """Brings all of `folder` onto the disk, and gives what is in it one mode: that of `folder`, for files without the right to run
    them."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    for root, folders, files in os.walk(folder):
        for name in folders:
            os.chmod(os.path.join(root, name), mode)
        for name in files:
            os.chmod(os.path.join(root, name), mode & 0o666)
            sync(Path(root, name))
    for root, _, _ in os.walk(folder, topdown=False):
        sync(Path(root))
