"""Memory that a thread uses again for piece after piece: pages that are new to a process cost more than copying into them."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np


class _Held(threading.local):
    """What this thread has: buffers that are free, and those lent in the scope that it is in (None outside one)."""

    def __init__(self):
        self.free: list[np.ndarray] = []
        self.lent: list[np.ndarray] | None = None


_HELD = _Held()


@contextlib.contextmanager
def reused() -> Iterator[None]:
    """A scope in which `empty` gives memory that the next scope of this thread gives again: no array of it may outlive the scope."""
    if _HELD.lent is not None:
        raise AssertionError("a scope within a scope")
    _HELD.lent = []
    try:
        yield
    finally:
        _HELD.free, _HELD.lent = [*_HELD.free, *_HELD.lent], None


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of any values, as `numpy.empty` makes; within `reused`, in memory of its own only until the scope ends."""
    if _HELD.lent is None:
        return np.empty(shape, dtype)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    _HELD.free.sort(key=len)
    number = next((n for n, held in enumerate(_HELD.free) if len(held) >= size), None)
    if number is None:
        del _HELD.free[-1:]  # too small, as all are
        buffer = np.empty(size, np.uint8)
    else:
        buffer = _HELD.free.pop(number)
    _HELD.lent.append(buffer)
    return buffer[:size].view(dtype).reshape(shape)
