"""Picture files: reading them, masks among them, and the settings in PNG files that this project wrote."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from dynaip_jax.errors import UserError
from dynaip_jax.images.writing import SETTINGS_KEY

# No other formats: some of PIL's readers start programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
KINDS = "PNG, JPEG, WebP, TIFF, BMP, GIF or PPM"
MIN_SIDE = 8
MAX_PIXELS = 100_000_000

WHITE, BLACK = (255, 255, 255, 255), (0, 0, 0, 255)


def load_image(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, data: bytes | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture in a file, uint8 `[H, W, 3]` RGB, turned as its EXIF orientation says.

    `data`: the content of the file, if it is in memory already; `path` then only names it in errors.

    Transparency is laid on white; 16-bit, grey, palette and CMYK pictures are converted; of several frames the first is
    taken. Raises `UserError` for a file that is missing, truncated, corrupt or not a picture, for fewer than 8 pixels a
    side, and, before any pixel is decoded, for more than `max_pixels` (PIL refuses more than twice
    `PIL.Image.MAX_IMAGE_PIXELS` whatever is asked).
    """
    return np.array(_read(Path(path), max_pixels, WHITE, data))


def load_mask(path: str | Path, height: int, width: int) -> Float32[np.ndarray, "{height} {width}"]:
    """A region of the output picture, float32 `[height, width]` in [0, 1]: white inside, black or transparent outside.

    A mask of another size but the same shape (aspect ratio within 1 %) is resized. Raises `UserError` for a file that
    `load_image` would refuse, for another shape, and for a mask that is black everywhere.
    """
    path = Path(path)
    grey = _read(path, MAX_PIXELS, BLACK).convert("L")
    if abs(grey.width * height / (grey.height * width) - 1) > 0.01:
        raise UserError(
            f"{path}: a mask of {grey.width} x {grey.height} pixels for a picture of {width} x {height}; "
            "expected that size, or another of the same aspect ratio; crop or pad the mask"
        )
    mask = np.asarray(grey, np.float32) / 255
    if mask.max() == 0:
        raise UserError(f"{path}: the mask is black everywhere; expected the subject's region in white; paint it white")
    if mask.shape != (height, width):
        resized = Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR)
        mask = np.clip(np.asarray(resized, np.float32), 0, 1)
    return mask


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` put into a PNG file; its pixels are not read.

    Raises `UserError` for a file that is missing, not a PNG, or without such settings.
    """
    path = Path(path)
    with _opened(path, ("PNG",), "a PNG made by dynaip") as picture:
        text = picture.info.get(SETTINGS_KEY)
    try:
        settings = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds no settings; expected a PNG written by dynaip, unedited; use the original file")
    return settings


def _read(path: Path, max_pixels: int, background: tuple[int, int, int, int], data: bytes | None = None) -> Image.Image:
    """The first frame as RGB, upright, its transparency laid on `background`. Errors as in `load_image`."""
    with _opened(path, FORMATS, f"a picture ({KINDS})", data) as picture:
        width, height = picture.size
        if width * height > max_pixels:
            raise UserError(
                f"{path}: a picture of {width} x {height} pixels; expected at most {max_pixels} in all; make it smaller"
            )
        if min(width, height) < MIN_SIDE:
            raise UserError(
                f"{path}: a picture of {width} x {height} pixels; expected at least {MIN_SIDE} a side; use a larger one"
            )
        try:
            return _rgb(ImageOps.exif_transpose(picture), background)
        except Exception as e:  # a broken file can make a decoder fail in any way
            raise UserError(
                f"{path}: cannot be decoded ({e}); expected a whole picture of 8 or 16 bits a channel; "
                "copy it again, or save it anew as PNG or JPEG"
            ) from e


def _opened(path: Path, formats: tuple[str, ...], expected: str, data: bytes | None = None) -> Image.Image:
    """The open file, of which only the header has been read."""
    if data is None and not path.is_file():
        raise UserError(f"{path}: no such file; expected {expected}; check the path")
    try:
        return Image.open(path if data is None else io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as e:
        raise UserError(f"{path}: the picture is too large ({e}); expected fewer pixels; make it smaller") from e
    except UnidentifiedImageError as e:
        raise UserError(f"{path}: not a picture, or a broken one; expected {expected}; use another file") from e
    except Exception as e:  # a broken file can make a reader fail in any way
        raise UserError(f"{path}: cannot be opened ({e}); expected {expected}; use another file") from e


def _rgb(picture: Image.Image, background: tuple[int, int, int, int]) -> Image.Image:
    if picture.mode.startswith("I;16"):
        wide = np.asarray(picture).astype(np.uint32)
        picture = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise ValueError("32 bits a pixel, of no known range")
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture.convert("RGBA"))
    return picture.convert("RGB")
