"""Memory: what a program needs, what there is, and the error of one that does not get it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from dynaip_jax.errors import OutOfMemory, out_of_memory

GIB = 2**30
# of a container: the files with its limit, with what is used, and with the part of that which can be had back at once
LIMITS = tuple(
    (f"sys/fs/cgroup/{limit}", f"sys/fs/cgroup/{used}", f"sys/fs/cgroup/{stat}")
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    )
)
CACHED = ("inactive_file", "active_file")


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """A device or a host that runs out of memory in the block becomes an `OutOfMemory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        raise OutOfMemory(" ".join(str(e).split())[:160]) from e


def check_fits(program: jax.stages.Compiled) -> None:
    """Raises `OutOfMemory` if a compiled program needs more than is free, where both are known: a system that promises more than it
    has would kill the process."""
    analysis: Any = program.memory_analysis()
    devices = jax.tree.leaves(program.input_shardings)[0].addressable_devices
    free = free_bytes(next(iter(devices)))
    if analysis is None or free is None:
        return
    needed = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    if next(iter(devices)).platform == "cpu":
        needed *= len(devices)  # which share the host's memory
    if needed > free:
        raise OutOfMemory(f"{needed / GIB:.1f} GiB are needed beside the weights, {free / GIB:.1f} GiB are free")


def free_bytes(device: jax.Device) -> int | None:
    """What a device has left; None where it does not say."""
    if device.platform == "cpu":
        return host_free_bytes()
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if {"bytes_limit", "bytes_in_use"} <= stats.keys() else None


def host_free_bytes(root: Path = Path("/")) -> int | None:
    """What the host, or the container in it, has left, swap included; None where the system does not say. `root`: of its files."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        free = sizes["MemAvailable"] + sizes.get("SwapFree", 0)
    except (OSError, ValueError, KeyError, IndexError):
        return None
    for limit, used, stat in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such limit
            pairs = (line.split() for line in (root / stat).read_text().splitlines())
            cached = sum(int(size) for name, size in pairs if name in CACHED)
            free = min(free, int((root / limit).read_text()) - int((root / used).read_text()) + cached)
    return free
