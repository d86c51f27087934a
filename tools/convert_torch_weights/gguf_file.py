"""GGUF files: their tensors by name, in the order of axes that numpy has; quantised ones are undone where they are read.

The package `gguf` reads the format and knows its quantisations.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dynaip_jax.errors import UserError, reason
from dynaip_jax.storage.tensors import Tensors

MOST = 1 << 16  # entries of a header
PLAIN = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
}  # fmt: skip


class GGUFFile(Tensors):
    """The tensors of a GGUF file. `metadata`: its texts; `precision`: such as "F32+Q8_0".

    Quantised weights have the dtype bfloat16 where it is asked for, and are float32 where they are read. Raises `UserError` for a
    damaged file and if the package is missing.
    """

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as e:
            raise UserError(
                f"{path}: GGUF is read by the package gguf, which is not installed; pip install gguf"
            ) from e
        try:
            with open(path, "rb") as file:
                start = file.read(24)
            version, tensors, entries = struct.unpack("<IQQ", start[4:24])
            if version not in (2, 3) or max(tensors, entries) > MOST:
                raise ValueError(f"version {version}, {tensors} tensors, {entries} entries")
            reader = _strict_reader(gguf)(path)
            self._tensors = {t.name: t for t in reader.tensors}
            if len(self._tensors) != tensors:
                raise ValueError("a name stands twice")
            self.metadata = {name: _text(field) for name, field in reader.fields.items()}
            self._shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
            for t in reader.tensors:
                if t.data.nbytes != t.n_bytes or t.n_elements != math.prod(self._shapes[t.name]):
                    raise ValueError(f"{t.name} is cut off")
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as e:  # whatever the package makes of bytes that are not GGUF
            raise UserError(f"{path}: not a whole GGUF file ({reason(e)}); download or copy it again") from e
        if reshaped := [name for name in self.metadata if name.startswith("comfy.gguf.orig_shape.")]:
            raise UserError(
                f"{path}: {reshaped[0]}: its tensors were reshaped; expected them as the model has them; use another file"
            )
        self.precision = "+".join(sorted({t.tensor_type.name for t in reader.tensors}))

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Rows of a tensor; float32 if it is quantised."""
        from gguf import quants

        t, shape = self._tensors[name], self._shapes[name]
        data = t.data[index[0]] if index else t.data
        plain = PLAIN.get(t.tensor_type.name)
        if 0 in shape:  # of which the package can undo no quantisation
            values = np.zeros(0, plain or np.float32)
        elif plain is not None:
            values = np.ascontiguousarray(data).view(plain)
        else:
            try:
                values = quants.dequantize(data, t.tensor_type)
            except NotImplementedError as e:
                raise UserError(
                    f"{name} is quantised as {t.tensor_type.name}; expected a kind that the package gguf reads; use another file"
                ) from e
        if not shape:
            return values.reshape(())
        count = len(range(*index[0].indices(shape[0]))) if index else shape[0]
        return values.reshape(count, *shape[1:])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor, without reading it; bfloat16 for quantised ones."""
        return np.dtype(PLAIN.get(self._tensors[name].tensor_type.name, ml_dtypes.bfloat16))


def _strict_reader(gguf: Any) -> Any:
    """The package's reader, which past the end of a file reads nothing, as many times as a damaged list says that it is long."""

    class Reader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, **options: Any) -> Any:
            if count and offset + count * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it is cut off")
            return super()._get(offset, dtype, count, **options)

    return Reader


def _text(field: Any) -> str:
    """A field's value if it is text."""
    from gguf import GGUFValueType

    return str(field.contents()) if field.types[:1] == [GGUFValueType.STRING] else ""
