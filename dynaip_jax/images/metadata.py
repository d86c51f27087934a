"""Picture files without what stands beside their pixels, for those whose metadata a reader stumbles over."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Iterator

PNG = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = ((b"tRNS", b"eXIf", b"iCCP"), (b"tRNS",))
JPEG = b"\xff\xd8"
JPEG_KEPT = ((0xE0, 0xE1, 0xE2, 0xEE), (0xE0, 0xEE))  # JFIF, EXIF, ICC, Adobe's colour transform
JPEG_SCAN, JPEG_COMMENT, JPEG_ADOBE, JPEG_ADOBE_LENGTH = 0xDA, 0xFE, 0xEE, 14


def without_metadata(data: bytes) -> Iterator[bytes]:
    """The same PNG or JPEG file, first with what turns and colours it and is whole, then with its pixels alone; nothing for others."""
    if data.startswith(PNG):
        yield from (_png(data, kept) for kept in PNG_KEPT)
    elif data.startswith(JPEG):
        yield from (_jpeg(data, kept) for kept in JPEG_KEPT)


def _png(data: bytes, kept: Collection[bytes]) -> bytes:
    """A PNG's critical chunks, and those `kept` whose checksum is right. A chunk that is cut off stays as it is."""
    parts, at = [PNG], len(PNG)
    while at + 12 <= len(data):
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            parts.append(data[at:])
            break
        critical = not kind[0] & 0x20
        whole = zlib.crc32(data[at + 4 : end - 4]) == struct.unpack_from(">I", data, end - 4)[0]
        if critical or (kind in kept and whole):
            parts.append(data[at:end])
        at = end
    return b"".join(parts)


def _jpeg(data: bytes, kept: Collection[int]) -> bytes:
    """A JPEG without comments, and of application segments those `kept` alone."""
    parts, at = [JPEG], len(JPEG)
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != JPEG_SCAN:
        marker, (length,) = data[at + 1], struct.unpack_from(">H", data, at + 2)
        end = at + 2 + length
        metadata = 0xE0 <= marker <= 0xEF or marker == JPEG_COMMENT
        short = marker == JPEG_ADOBE and length < JPEG_ADOBE_LENGTH
        if not metadata or (marker in kept and not short):
            parts.append(data[at:end])
        at = end
    return b"".join([*parts, data[at:]])
