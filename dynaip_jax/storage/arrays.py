"""NumPy's files, read strictly: never a pickle, never more bytes than the file has, parts by reading and not by mapping into memory."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import weakref
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dynaip_jax.errors import reason

HEADER_BYTES = 4096
SIZE = "(?:0|[1-9][0-9]*)"
HEADER = re.compile(
    r"\{ *'descr': *'(?P<dtype>[<>=|]?[A-Za-z]+[0-9]*)', *'fortran_order': *(?P<fortran>True|False), *"
    rf"'shape': *\((?P<shape>(?:{SIZE}, *(?:{SIZE}(?:, *{SIZE})*,? *)?)?)\),? *\}}[ \n]*"
)  # by itself: NumPy reads it with Python's parser, which warns, and who would hold warnings back does so in all threads
NUMBERS = "biuf"  # kinds of dtype: truth values, whole numbers, floats
RATIO = 1100  # at most so many bytes out of one of a zip archive, which deflate cannot exceed


class Header(NamedTuple):
    """What the head of a `.npy` file says; the values begin at the byte `start`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    start: int


def read_header(file: IO[bytes], kinds: str = NUMBERS) -> Header:
    """The header of a `.npy` file, or of a member of an `.npz` file. Raises `ValueError` for anything else and for other `kinds` of
    values (pickles are none)."""
    start = file.tell()
    try:
        width = {(1, 0): 2, (2, 0): 4}[np.lib.format.read_magic(file)]
        length = int.from_bytes(file.read(width), "little")
        words = HEADER.fullmatch(file.read(min(length, HEADER_BYTES)).decode("latin1"))
        if words is None:
            raise ValueError("its header is not as NumPy writes it")
        dtype, shape = np.dtype(words["dtype"]), tuple(map(int, re.findall(SIZE, words["shape"])))
    except Exception as e:  # NumPy has many of what is no file of its and no dtype
        raise ValueError(f"no .npy file: {reason(e)}") from e
    if dtype.hasobject or dtype.kind not in kinds or dtype.subdtype:
        raise ValueError(f"holds {dtype} {shape}, expected plain numbers")
    return Header(dtype, shape, words["fortran"] == "True", start + 8 + width + length)


def read_whole_header(file: IO[bytes], size: int, kinds: str = NUMBERS) -> Header:
    """The header of a `.npy` file of `size` bytes. Raises `ValueError` as `read_header` does, and unless its values fill the rest."""
    if file.read(2) == b"PK":
        raise ValueError("no .npy file: an .npz archive of several arrays")
    file.seek(0)
    head = read_header(file, kinds)
    expected = head.start + math.prod(head.shape) * head.dtype.itemsize
    if size != expected:
        raise ValueError(f"{size} bytes, its header asks for {expected}")
    return head


def read_array(data: bytes, kinds: str = NUMBERS) -> np.ndarray:
    """The array in a `.npy` file's `data`. Raises `ValueError` as `read_whole_header` does."""
    file = io.BytesIO(data)
    head = read_whole_header(file, len(data), kinds)
    values = np.frombuffer(data, head.dtype, offset=head.start)
    return values.reshape(head.shape, order="F" if head.fortran else "C")


def read_arrays(data: bytes, names: Collection[str], most: int) -> dict[str, np.ndarray]:
    """Those of the arrays `names` that a `.npz` file's `data` holds, of at most `most` bytes each; text too. Raises `ValueError` for
    what is no such file or damaged."""
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in names:
                entry = archive.NameToInfo.get(f"{name}.npy")
                if entry is None:
                    continue
                if entry.file_size > min(most, RATIO * len(data)):
                    raise ValueError(f"{name} would be {entry.file_size} bytes")
                arrays[name] = read_array(archive.read(entry), NUMBERS + "U")
    except ValueError:
        raise
    except Exception as e:  # zipfile and its decompressors have many
        raise ValueError(f"no whole .npz file: {reason(e)}") from e
    return arrays


class Rows:
    """A `.npy` file that is read row by row: `rows[i, j]` is what lies under the first indices of its array.

    `checks`: a checksum (`crc32`) of each such row, of the leading shape that indices have, or None. Raises `OSError` or `ValueError`
    for a file that is none, is damaged, or is cut short meanwhile.
    """

    def __init__(self, path: Path, checks: np.ndarray | None = None):
        self.path, self._checks = path, checks
        self._file = path.open("rb")
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._file.close)
            self.head = read_whole_header(self._file, os.fstat(self._file.fileno()).st_size)
            if self.head.fortran:
                raise ValueError("its values are in Fortran's order")
            on_failure.pop_all()
        weakref.finalize(self, self._file.close)  # who reads it in another thread keeps it open

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._checks)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""
        return self.head.shape

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        rest = self.shape[len(index) :]
        if not all(0 <= i < n for i, n in zip(index, self.shape, strict=False)):
            raise ValueError(f"has the shape {self.shape}, no row {index}")
        number = 0
        for i, n in zip(index, self.shape, strict=False):
            number = number * n + i
        size = math.prod(rest) * self.head.dtype.itemsize
        data = os.pread(self._file.fileno(), size, self.head.start + number * size)
        if len(data) != size:
            raise ValueError("was cut short while it was read")
        if self._checks is not None and crc32(data) != self._checks[index]:
            raise ValueError(f"row {index} is damaged: its checksum is another")
        return np.frombuffer(data, self.head.dtype).reshape(rest)


def crc32(data: bytes | np.ndarray) -> int:
    """The checksum of bytes, or of those of an array."""
    return zlib.crc32(data if isinstance(data, bytes) else data.tobytes())
