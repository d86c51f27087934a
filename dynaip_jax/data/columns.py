"""Single values of the arrays of an `.npz` file, read when they are asked for.

A process that reads records needs the number and the checksum of those it reads, not of ten million others. The file is read, not mapped
into memory, so that one which is cut short meanwhile is an error and not the end of the process.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dynaip_jax.storage.arrays import NUMBERS, read_header

HEADER = struct.Struct("<26xHH")  # of a member of a zip file: the lengths of its name and of what else is said


class Column:
    """`column[row]` is a value, or a row, of the array `name` of an uncompressed `.npz`. Raises `ValueError` for a file of another kind."""

    def __init__(self, path: Path, name: str):
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        with open(path, "rb") as file:
            file.seek(member.header_offset)
            named, more = HEADER.unpack(file.read(HEADER.size))
            file.seek(member.header_offset + HEADER.size + named + more)
            head = read_header(file, NUMBERS + "U")
        if not head.shape or head.fortran or head.dtype.kind not in NUMBERS:
            raise ValueError(f"{name} is {head.dtype} {head.shape}, expected rows of numbers")
        (self._count, *self._shape), self._dtype, self._start = head.shape, head.dtype, head.start
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Any:
        if not 0 <= row < self._count:
            raise IndexError(f"row {row} of {self._count}")
        size = self._dtype.itemsize * math.prod(self._shape)
        data = os.pread(self._file, size, self._start + size * row)
        return np.frombuffer(data, self._dtype).reshape(self._shape)[()]
