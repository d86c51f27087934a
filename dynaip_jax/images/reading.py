"""The one door for pictures: a file, its bytes, a PIL image or an array becomes upright 8-bit RGB in sRGB, or is refused in one line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError, features

from dynaip_jax.errors import UserError
from dynaip_jax.images.arrays import as_array, is_array, pixels
from dynaip_jax.images.colours import channels, in_srgb
from dynaip_jax.images.metadata import JPEG, PNG, without_metadata

# No other formats: some of PIL's readers start programs (EPS runs Ghostscript).
AVIF = features.check("avif")
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", *(("AVIF",) if AVIF else ()))
KINDS = f"PNG, JPEG, WebP, TIFF, BMP, GIF{', AVIF' if AVIF else ''} or PPM"
EXPECTED = f"a picture ({KINDS})"
PICTURE = "a path, the bytes of a file, a binary file object, a PIL image, or an array"
MIN_SIDE = 8
MAX_PIXELS = 100_000_000
WHITE, BLACK = (255, 255, 255, 255), (0, 0, 0, 255)

ADDRESS = re.compile(r"data:|[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # pathlib makes one slash of two
AVIF_BRANDS = {b"avif", b"avis"}  # of an ISO media file
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
ORIENTATION = 0x0112  # EXIF 2.3
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Undecodable(UserError):
    """The file is there, but PIL cannot make a picture of it."""


def load_image(
    source: Any, *, name: str | None = None, max_pixels: int = MAX_PIXELS, data: bytes | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """A picture as uint8 `[H, W, 3]`, RGB in sRGB, turned as its EXIF orientation says.

    `source`: a path, the bytes of a file, a binary file object, a PIL image, or an array `[H, W, 3]` of NumPy, JAX, torch and the
    like: uint8, or floats from 0 to 1. `name`: what errors call it (a file is called by its path). `data`: the content of the
    file `source`, if it is in memory already.

    Transparency is laid on white; 16-bit, grey, palette and CMYK pictures are converted, those with an ICC profile by it; of several
    frames the first is taken. Metadata that cannot be read is ignored. Raises `UserError` for a file that is missing, truncated,
    corrupt or not a picture, for arrays of another shape or range, for fewer than 8 pixels a side, and, before any pixel
    is decoded, for more than `max_pixels` (PIL refuses more than twice `PIL.Image.MAX_IMAGE_PIXELS` whatever is asked).
    """
    name = name or named(source, "picture")
    if data is None and is_array(source):
        array = pixels(as_array(source, name), name)
        _check_size(name, array.shape[1], array.shape[0], max_pixels)
        return array
    return np.array(laid_on(WHITE, decoded(source if data is None else data, name, max_pixels)))


def load_images(sources: Any, option: str) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Each of one or several pictures as from `load_image`; `option`: what errors call those that are no files."""
    given = several(sources, option)
    return [load_image(source, name=named(source, f"`{option}` {n}")) for n, source in enumerate(given, 1)]


def several(sources: Any, option: str) -> list[Any]:
    """One picture, or what holds several, as a list. An array of more than three axes holds several."""
    single = isinstance(sources, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)) or hasattr(
        sources, "read"
    )
    if single or (is_array(sources) and len(getattr(sources, "shape", ())) <= 3):
        return [sources]
    if not isinstance(sources, Iterable):
        raise UserError(f"`{option}`: found {type(sources).__name__}; expected {PICTURE}, or several")
    return list(sources)


Otherwise = TypeVar("Otherwise", str, None)


def named(source: Any, otherwise: Otherwise) -> str | Otherwise:
    """The path of a picture, if it is one; `otherwise` what it is to be called."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else otherwise


def digest(array: np.ndarray) -> str:
    """sha256 over shape, type and values of an array: the same for a picture however it was handed over."""
    content = hashlib.sha256(f"{array.dtype.name} {array.shape}\n".encode())
    content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()


def laid_on(background: tuple[int, int, int, int], picture: Image.Image) -> Image.Image:
    """A picture of `decoded` without its transparency."""
    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB")


def decoded(source: Any, name: str, max_pixels: int) -> Image.Image:
    """What is no array as a PIL image, RGB or RGBA, upright and in sRGB. Errors as in `load_image`."""
    if isinstance(source, Image.Image):
        return _plain(source, name, max_pixels)
    file = _file(source, name)
    try:
        with opened(file, name, FORMATS, EXPECTED) as picture:
            return _plain(picture, name, max_pixels)
    except Undecodable as e:
        for less in without_metadata(_content(file)):
            with contextlib.suppress(Undecodable), opened(less, name, FORMATS, EXPECTED) as picture:
                return _plain(picture, name, max_pixels)
        raise e


def opened(file: Path | bytes, name: str, formats: tuple[str, ...], expected: str) -> Image.Image:
    """The picture in a file, of which only the header has been read."""
    if isinstance(file, Path):
        _check_plain(file, name, expected)
    try:
        return Image.open(file if isinstance(file, Path) else io.BytesIO(file), formats=formats)
    except Image.DecompressionBombError as e:
        raise UserError(f"{name}: the picture is too large ({e}); expected fewer pixels; make it smaller") from e
    except Exception as e:  # a broken file can make a reader fail in any way
        kind = _iso_kind(file)
        if kind and kind not in formats:
            raise UserError(
                f"{name}: a picture in {kind}, which is not read here; expected {expected}; save it as JPEG or PNG"
            ) from e
        unknown = isinstance(e, UnidentifiedImageError)
        reason = "not a picture, or a broken one" if unknown else f"cannot be opened ({_reason(e)})"
        raise Undecodable(f"{name}: {reason}; expected {expected}; use another file") from e


def _file(source: Any, name: str) -> Path | bytes:
    """The path, or the content in memory."""
    if isinstance(source, (str, os.PathLike)):
        return Path(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if hasattr(source, "read"):
        try:
            content = source.getvalue() if hasattr(source, "getvalue") else source.read()
        except (OSError, ValueError) as e:
            raise UserError(
                f"{name}: the file object cannot be read ({_reason(e)}); expected an open one; open it again"
            ) from e
        if isinstance(content, bytes):
            return content
        source = content
    raise UserError(f"{name}: found {type(source).__name__}; expected {PICTURE}")


def _content(file: Path | bytes) -> bytes:
    """All of a file of a kind that `without_metadata` knows; of others, and of one that cannot be read, nothing."""
    if isinstance(file, bytes):
        return file
    with contextlib.suppress(OSError), file.open("rb") as stream:
        head = stream.read(len(PNG))
        return head + stream.read() if head.startswith((PNG, JPEG)) else b""
    return b""


def _check_plain(path: Path, name: str, expected: str) -> None:
    """Raises `UserError` unless there is a plain file, which alone can be opened without waiting."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as e:
        if ADDRESS.match(name):
            raise UserError(f"{name}: an address, not a file; expected {expected}; download it first") from e
        missing = isinstance(e, (FileNotFoundError, NotADirectoryError))
        reason = "no such file" if missing else f"cannot be opened ({_reason(e)})"
        raise UserError(f"{name}: {reason}; expected {expected}; check the path") from e
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "not a plain file"
        raise UserError(f"{name}: {found}; expected {expected}; name a file")


def _iso_kind(file: Path | bytes) -> str | None:
    """ "HEIC" or "AVIF", which phones write; None for another file."""
    if isinstance(file, Path):
        with contextlib.suppress(OSError), file.open("rb") as stream:
            file = stream.read(64)
    if isinstance(file, Path) or file[4:8] != b"ftyp":
        return None
    brands = {file[n : n + 4] for n in range(8, min(len(file), int.from_bytes(file[:4]), 64), 4)}
    return "AVIF" if brands & AVIF_BRANDS else "HEIC" if brands & HEIC_BRANDS else None


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UserError(
            f"{name}: a picture of {width} x {height} pixels; expected at most {max_pixels} in all; make it smaller"
        )
    if min(width, height) < MIN_SIDE:
        raise UserError(
            f"{name}: a picture of {width} x {height} pixels; expected at least {MIN_SIDE} a side; use a larger one"
        )


def _plain(picture: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """An opened picture as RGB or RGBA, upright and in sRGB."""
    _check_size(name, *picture.size, max_pixels)
    try:
        _load(picture)
        turn = TURNS.get(_orientation(picture))
        colours, opacity = channels(picture)
        rgb = in_srgb(colours, picture.info.get("icc_profile"))
        if opacity is not None:
            rgb.putalpha(opacity)
        return rgb if turn is None else rgb.transpose(turn)
    except Exception as e:  # a broken file can make a decoder fail in any way
        raise Undecodable(
            f"{name}: cannot be decoded ({_reason(e)}); expected a whole picture of 8 or 16 bits a channel; "
            "copy it again, or save it anew as PNG or JPEG"
        ) from e


def _load(picture: Image.Image) -> None:
    """Decodes the pixels. What PIL reads of a TIFF after them is metadata, which may be broken."""
    if picture.format != "TIFF" or not hasattr(picture, "load_end"):
        picture.load()
        return
    finish = picture.load_end

    def tolerant() -> None:
        with contextlib.suppress(Exception):
            finish()

    picture.load_end = tolerant
    try:
        picture.load()
    finally:
        del picture.load_end


def _orientation(picture: Image.Image) -> int:
    """EXIF's orientation; 1, upright, if there is none that can be read."""
    try:
        value = picture.getexif().get(ORIENTATION)
    except Exception:  # whatever broken metadata leads to
        return 1
    return value if isinstance(value, int) else 1


def _reason(error: Exception) -> str:
    """What an error says, without the name of the file."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:120]
