"""Drawing many pictures with all cores."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any


def in_processes(make: Callable[[int], Any], count: int) -> list[Any]:
    """`make(n)` for n below `count`, in order. `make` must be picklable."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        return pool.map(make, range(count), chunksize=64)
