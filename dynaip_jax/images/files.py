"""Picture files: reading, masks, CLIP's preprocessing, writing. NumPy and PIL only.

Axis letters: H, W pixels; i image tokens, row-major; s subjects.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from dynaip_jax.errors import UserError

# No other formats: some of PIL's readers start programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
KINDS = "PNG, JPEG, WebP, TIFF, BMP, GIF or PPM"
MIN_SIDE = 8
MAX_PIXELS = 100_000_000
SETTINGS_KEY = "dynaip"

# openai/clip `clip.py`, `_transform`; the colour is the mean in 8 bits, which is 0 after normalisation.
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
NEUTRAL = (123, 117, 104)

WHITE, BLACK = (255, 255, 255, 255), (0, 0, 0, 255)


def load_image(path: str | Path, *, max_pixels: int = MAX_PIXELS, data: bytes | None = None) -> np.ndarray:
    """The picture in a file, uint8 `[H, W, 3]` RGB, turned as its EXIF orientation says.

    `data`: the content of the file, if it is in memory already; `path` then only names it in errors.

    Transparency is laid on white; 16-bit, grey, palette and CMYK pictures are converted; of several frames the first is
    taken. Raises `UserError` for a file that is missing, truncated, corrupt or not a picture, for fewer than 8 pixels a
    side, and, before any pixel is decoded, for more than `max_pixels` (PIL refuses more than twice
    `PIL.Image.MAX_IMAGE_PIXELS` whatever is asked).
    """
    return np.array(_read(Path(path), max_pixels, WHITE, data))


def load_mask(path: str | Path, height: int, width: int) -> np.ndarray:
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


def mask_to_tokens(mask: np.ndarray, patch: int = 16) -> np.ndarray:
    """The share of each image token that `mask` `[H, W]` covers: means over `patch` x `patch` pixels, float32 `[i]`.

    `patch` is the pixels a side of one token (16 for FLUX: 8 in the autoencoder, 2 in packing). Raises `ValueError` if
    H or W is not a multiple of it.
    """
    height, width = mask.shape
    if height % patch or width % patch:
        raise ValueError(f"mask of {height} x {width}: expected multiples of {patch}")
    blocks = mask.reshape(height // patch, patch, width // patch, patch)
    return blocks.mean(axis=(1, 3), dtype=np.float32).reshape(-1)


def regions(masks: Sequence[np.ndarray], patch: int = 16) -> np.ndarray:
    """Regions `[s, i]` float32 from one mask `[H, W]` a subject; where subjects overlap, their shares sum to 1."""
    shares = np.stack([mask_to_tokens(mask, patch) for mask in masks])
    return shares / np.maximum(shares.sum(axis=0), 1)


def square(
    image: np.ndarray, mode: Literal["pad", "crop"] = "pad", fill: tuple[int, int, int] | None = None
) -> np.ndarray:
    """A square picture from uint8 `[H, W, 3]`: "pad" centres it on the colour `fill` (None: CLIP's mean colour), "crop"
    keeps its centre. Raises `ValueError` for another mode, and for a `fill` when cropping."""
    height, width = image.shape[:2]
    if mode == "crop" and fill is None:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return image[top : top + side, left : left + side]
    if mode == "pad":
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        canvas = np.empty((side, side, 3), np.uint8)
        canvas[:] = NEUTRAL if fill is None else fill
        canvas[top : top + height, left : left + width] = image
        return canvas
    raise ValueError(f"mode {mode!r}, fill {fill}: expected 'pad' with or without a fill, or 'crop' without")


def clip_pixels(image: np.ndarray, size: int = 224, mode: Literal["pad", "crop"] = "pad") -> np.ndarray:
    """CLIP's input float32 `[size, size, 3]` from uint8 `[H, W, 3]`: made square, resized, normalised.

    Source: `CLIPImageProcessor` of transformers: antialiased bicubic in 8 bits, then (x / 255 - mean) / std.
    """
    resized = Image.fromarray(square(image, mode)).resize((size, size), Image.Resampling.BICUBIC)
    return (np.asarray(resized, np.float32) / 255 - CLIP_MEAN) / CLIP_STD


def to_uint8(images: Any) -> np.ndarray:
    """8-bit pictures from float ones in [-1, 1] of any shape; values outside are clipped, halves go to the even number.

    Source: diffusers' `VaeImageProcessor`. Raises `UserError` for NaN or infinity.
    """
    x = np.asarray(images, np.float32)
    bad = x.size - np.count_nonzero(np.isfinite(x))
    if bad:
        raise UserError(
            f"output picture: {bad} of {x.size} values are NaN or infinite; expected numbers in [-1, 1]; "
            "check the weights for NaN, or compute in float32"
        )
    return np.round(np.clip(x / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def grid(images: Sequence[np.ndarray | Image.Image], columns: int | None = None) -> Image.Image:
    """One picture of equally sized ones (uint8 `[H, W, 3]` or PIL), row by row; empty cells are white.

    `columns` defaults to the number that makes the grid about square. Raises `ValueError` for no or unequal pictures
    and for fewer than one column.
    """
    cells = [np.asarray(image) for image in images]
    shapes = sorted({cell.shape for cell in cells})
    if len(shapes) != 1:
        raise ValueError(f"grid of pictures shaped {shapes}: expected at least one picture, all of one size")
    columns = math.ceil(math.sqrt(len(cells))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"grid of {columns} columns: expected at least 1")
    columns = min(columns, len(cells))
    height, width, channels = shapes[0]
    canvas = np.full((math.ceil(len(cells) / columns) * height, columns * width, channels), 255, np.uint8)
    for n, cell in enumerate(cells):
        top, left = n // columns * height, n % columns * width
        canvas[top : top + height, left : left + width] = cell
    return Image.fromarray(canvas)


def labelled(image: np.ndarray, text: str, size: int) -> np.ndarray:
    """uint8 `[H, W, 3]` resized to `size` x `size`, with a white strip above it that says `text`: `[size + 16, size, 3]`."""
    canvas = Image.new("RGB", (size, size + 16), "white")
    canvas.paste(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC), (0, 16))
    ImageDraw.Draw(canvas).text((3, 2), text, fill="black")
    return np.asarray(canvas)


def check_png_path(path: str | Path, *, overwrite: bool) -> None:
    """Raises the `UserError` that `save_png` would for this name, so that one can ask before hours of work."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(
            f"{path}: output name ends in {path.suffix!r}; expected .png, which carries the settings; rename it"
        )
    if not path.parent.is_dir():
        raise UserError(
            f"{path}: there is no folder {path.parent}; expected an existing one; create it or change the path"
        )
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected the name of a file to write; change the path")
    if path.exists() and not overwrite:
        raise UserError(
            f"{path}: exists already; expected a new name; change it, or pass --overwrite to replace the file"
        )


def save_png(
    image: np.ndarray | Image.Image, path: str | Path, settings: dict[str, Any], *, overwrite: bool = False
) -> None:
    """Writes uint8 `[H, W, 3]` or a PIL picture as PNG, with `settings` as JSON in its text chunk "dynaip".

    The file appears whole or not at all: it is written under another name in the same folder, then renamed. Raises
    `UserError` for a name that does not end in .png, for a missing folder, for an existing file unless `overwrite`, and
    if it cannot be written.
    """
    path = Path(path)
    check_png_path(path, overwrite=overwrite)
    text = PngInfo()
    text.add_text(SETTINGS_KEY, json.dumps(settings, allow_nan=False))
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        picture.save(partial, format="PNG", pnginfo=text)
        os.replace(partial, path)
    except OSError as e:
        raise UserError(
            f"{path}: cannot be written ({e}); expected a writable folder with free space; change it"
        ) from e
    finally:
        partial.unlink(missing_ok=True)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` put into a PNG file; its pixels are not read.

    Raises `UserError` for a file that is missing, not a PNG, or without such settings.
    """
    path = Path(path)
    with _opened(path, ("PNG",), "a PNG made by dynaip") as picture:
        found = picture.info.get(SETTINGS_KEY)
    try:
        settings = json.loads(found) if isinstance(found, str) else None
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
