"""What devices can do, from their makers' data sheets."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """What one device can do, from its maker's data sheet: dense bfloat16 FLOP/s; bytes of memory; bytes/s from memory, and from
    all neighbours together over the links between chips (NVLink, ICI; one direction)."""

    flops: float
    memory: float
    memory_rate: float
    link_rate: float


CHIPS = {  # key: jax's device_kind, or a part of it; the first match wins
    "H200": Chip(989e12, 141e9, 4.8e12, 450e9),
    "H100": Chip(989e12, 80e9, 3.35e12, 450e9),
    "A100": Chip(312e12, 80e9, 2.0e12, 300e9),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1.64e12, 448e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2.765e12, 600e9),
    "TPU v4": Chip(275e12, 32 * 2**30, 1.228e12, 300e9),
}


def chip(device_kind: str) -> Chip | None:
    """What is known of a device, or None."""
    return next((chip for kind, chip in CHIPS.items() if kind.lower() in device_kind.lower()), None)
