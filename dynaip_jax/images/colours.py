"""Colours as 8-bit sRGB: bits, transparency, and ICC profiles."""

from __future__ import annotations

import functools
import io
import itertools

import numpy as np
from PIL import Image, ImageCms

SPACES = dict(RGB="RGB", L="GRAY", CMYK="CMYK")  # mode -> the colour space of profiles for it
SAME = 2  # of 255: a profile that changes no colour by more is sRGB by another name


def channels(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours of a decoded picture in 8 bits (RGB, L or CMYK), and its opacity (L); None: opaque. Raises `ValueError` for 32 bits."""
    if picture.mode.startswith("I;16"):
        wide = np.asarray(picture).astype(np.uint32)
        grey = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
        clear = picture.info.get("transparency")
        if not isinstance(clear, int):
            return grey, None
        return grey, Image.fromarray(np.where(wide == clear, 0, 255).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("32 bits a pixel, of no known range")
    if picture.has_transparency_data:
        both = _with_opacity(picture)
        if both is not None:
            return both.convert("L" if both.mode == "LA" else "RGB"), both.getchannel("A")
        picture = picture.copy()
        del picture.info["transparency"]
    return picture if picture.mode in SPACES else picture.convert("RGB"), None


def in_srgb(colours: Image.Image, profile: object) -> Image.Image:
    """RGB from `colours` (RGB, L or CMYK); `profile`: their ICC profile, which is ignored if it is broken or for other channels."""
    change = _to_srgb(profile, colours.mode) if isinstance(profile, bytes) and profile else None
    if change is None:
        return colours.convert("RGB")
    rgb = change.apply(colours)
    rgb.info.pop("icc_profile", None)
    return rgb


def _with_opacity(picture: Image.Image) -> Image.Image | None:
    """LA or RGBA of a picture that says something of transparency; None if that is broken."""
    clear = picture.info.get("transparency")
    if picture.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:  # 16 bits, of which PIL keeps 8
        picture = picture.copy()
        picture.info["transparency"] = tuple(value >> 8 for value in clear)
    try:
        return picture.convert("LA" if picture.mode in ("1", "L", "LA", "La") else "RGBA")
    except (ValueError, TypeError, OverflowError, SystemError):
        if "transparency" in picture.info:
            return None
        raise


@functools.lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile's colours to sRGB; None if it is broken, for other channels, or changes nothing that shows."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != SPACES[mode]:
            return None
        change = ImageCms.ImageCmsTransform(
            source, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")), mode, "RGB"
        )
        lattice = list(itertools.product(range(0, 256, 51), repeat=Image.getmodebands(mode)))
        probe = Image.frombytes(mode, (len(lattice), 1), bytes(itertools.chain(*lattice)))
        moved = np.asarray(change.apply(probe), int) - np.asarray(probe.convert("RGB"), int)
    except (OSError, ValueError, TypeError):
        return None
    return None if np.abs(moved).max() <= SAME else change
