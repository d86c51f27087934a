"""PNG files that carry their settings: written whole or not at all, over nothing unasked, and never lost once they are drawn."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dynaip_jax.errors import UserError

SETTINGS_KEY = "dynaip"
PROBE = bytes(4096)  # written to a folder to see whether it can be
SHORT = 80  # characters of a stem that is cut because the system takes no longer name
TRIES = 1000  # names that are tried in a folder


class Kept(NamedTuple):
    """Where a picture lies, and why it is not where it was to be; None if it is."""

    path: Path
    reason: str | None


def check_png_path(path: str | Path, *, overwrite: bool) -> None:
    """Raises the `UserError` that `save_png` would for this name, so that one can ask before hours of work. A block is written to
    the folder, and removed, to see whether that is possible."""
    text, path = os.fspath(path), Path(path)
    if text.endswith(os.sep):
        raise UserError(f"{text}: ends in {os.sep}, as a folder's name does; expected the name of a file; leave it out")
    if path.suffix.lower() != ".png":
        raise UserError(
            f"{path}: output name ends in {path.suffix!r}; expected .png, which carries the settings; rename it"
        )
    with _disk_errors(path):
        if not path.parent.is_dir():
            raise UserError(
                f"{path}: there is no folder {path.parent}; expected an existing one; create it or change the path"
            )
        _check_free(path, overwrite)
        with _partial(path, PROBE):
            pass


def save_png(
    image: UInt8[np.ndarray, "H W 3"] | Image.Image,
    path: str | Path,
    settings: dict[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Writes uint8 `[H, W, 3]` or a PIL picture as PNG, with `settings` as JSON in its text chunk "dynaip".

    The file appears whole or not at all: it is written under another name in the same folder, then renamed. Raises
    `UserError` for a name that does not end in .png, for a missing folder, for an existing file unless `overwrite`, and
    if it cannot be written.
    """
    check_png_path(path, overwrite=overwrite)
    with _disk_errors(Path(path)):
        _write(encoded(image, settings), Path(path), overwrite)


def keep_png(
    image: UInt8[np.ndarray, "H W 3"] | Image.Image,
    path: str | Path,
    settings: dict[str, Any],
    *,
    overwrite: bool = False,
) -> Kept:
    """Writes a picture as `save_png` does, or, where that cannot be, under another name beside `path`, or in the current, the home
    or the temporary folder. Raises `UserError` if it can be written nowhere."""
    path, content, reason = Path(path), encoded(image, settings), ""
    try:
        _check_free(path, overwrite)
        _write(content, path, overwrite)
        return Kept(path, None)
    except (OSError, UserError) as e:
        reason = _reason(e)
    for folder in (path.parent, *_elsewhere()):
        for name in _names(path):
            try:
                _write(content, folder / name, False)
                return Kept(folder / name, reason)
            except FileExistsError:
                continue
            except OSError as e:
                if e.errno != errno.ENAMETOOLONG:
                    break  # another folder
    raise UserError(
        f"{path}: cannot be written ({reason}), nor can {', '.join(map(str, _elsewhere()))}; the picture is lost; free space and "
        "make it again"
    )


def encoded(image: UInt8[np.ndarray, "H W 3"] | Image.Image, settings: dict[str, Any]) -> bytes:
    """The content of a PNG file."""
    text = PngInfo()
    text.add_text(SETTINGS_KEY, json.dumps(settings, allow_nan=False))
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    content = io.BytesIO()
    picture.save(content, format="PNG", pnginfo=text)
    return content.getvalue()


def _check_free(path: Path, overwrite: bool) -> None:
    """Raises `UserError` if something lies at `path` that is not to be replaced."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected the name of a file to write; change the path")
    if os.path.lexists(path) and not overwrite:
        raise UserError(
            f"{path}: exists already; expected a new name; change it, or pass `overwrite` to replace the file"
        )
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path}: is a device or a pipe; expected the name of a plain file; change the path")


def _write(content: bytes, path: Path, overwrite: bool) -> None:
    """Raises `OSError`; `FileExistsError` if `path` has appeared meanwhile and not `overwrite`."""
    with _partial(path, content) as partial:
        if overwrite:
            os.replace(partial, path)
            return
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links: claim the name first
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            os.replace(partial, path)


@contextlib.contextmanager
def _partial(path: Path, content: bytes) -> Iterator[Path]:
    """A hidden file with `content` in the folder of `path`, removed after the block if it is still there. Its name is short whatever
    that of `path` is; the system is asked whether it takes that."""
    with contextlib.suppress(FileNotFoundError):
        path.lstat()
    for number in itertools.count():
        partial = path.with_name(f".dynaip.{os.getpid()}.{number}.partial")
        try:
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            break
        except FileExistsError:
            continue
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
        yield partial
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """What the system says against `path` becomes a `UserError`."""
    try:
        yield
    except OSError as e:
        name = str(path)
        if e.errno == errno.ENAMETOOLONG:
            raise UserError(
                f"{name[:60]}...: the name is too long for this disk; expected a shorter one; change it"
            ) from e
        raise UserError(
            f"{name}: nothing can be saved there ({_reason(e)}); expected a writable folder with free space; change it"
        ) from e


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _elsewhere() -> list[Path]:
    """Folders for pictures that cannot be written where they were to be."""
    folders = [Path(os.path.expanduser("~")), Path(tempfile.gettempdir())]
    with contextlib.suppress(FileNotFoundError):  # the current folder may be gone
        folders.insert(0, Path.cwd())
    return list(dict.fromkeys(folder for folder in folders if folder.is_absolute()))


def _names(path: Path) -> Iterator[str]:
    """The name of `path`, the same numbered, and both with the stem cut."""
    for stem in dict.fromkeys((path.stem, path.stem[:SHORT])):
        yield f"{stem}.png"
        for number in range(1, TRIES):
            yield f"{stem}-{number}.png"
