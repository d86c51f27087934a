"""Floating-point operations by formula (a compiler's count takes a scanned block once), and what devices can do."""

from __future__ import annotations

from typing import NamedTuple

from dynaip_jax.adapters.dynaip import DynaIPConfig
from dynaip_jax.models.flux import FluxConfig


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


def transformer(c: FluxConfig, image_rows: int, text_rows: int) -> int:
    """Of one forward of one sample: matrix products and attention, 2 a multiply-add; norms and the like left out."""
    w, n = c.hidden_size, image_rows + text_rows
    row = 2 * w * (3 * w + w + 2 * c.mlp_dim)  # qkv, projection, MLP: the same in both kinds of block
    attention = 4 * n * n * w
    modulation = 2 * w * w * (12 * c.depth + 3 * c.depth_single_blocks + 2)
    ends = 2 * w * (image_rows * (c.in_channels + c.out_channels) + text_rows * c.context_in_dim)
    return (c.depth + c.depth_single_blocks) * (n * row + attention) + modulation + ends


def injection(c: FluxConfig, adapter: DynaIPConfig, rows: int, reference_tokens: int, subjects: int = 1) -> int:
    """Of the reference attention in one forward of one sample."""
    return adapter.injected * 4 * rows * subjects * reference_tokens * c.hidden_size


def bank(adapter: DynaIPConfig, reference_tokens: int, subjects: int = 1) -> int:
    """Of experts and K/V projections for one sample: once a picture, or once a training step."""
    h = adapter.hmoe
    experts = 3 * 2 * h.expert_width * (h.clip_width + h.width)
    projections = adapter.injected * 2 * 2 * h.width * adapter.num_heads * adapter.head_dim
    tokens = h.resampler_tokens or reference_tokens
    return subjects * (reference_tokens * experts + tokens * projections)


def training_step(
    c: FluxConfig,
    adapter: DynaIPConfig | None,
    image_rows: int,
    text_rows: int,
    reference_tokens: int,
    *,
    base_trained: bool,
) -> int:
    """Of one training step of one sample without recomputation: forward, gradients of activations, and gradients of the
    weights that are trained. A frozen base costs 2 forwards, a trained one 3, the bank 3."""
    forward = transformer(c, image_rows, text_rows)
    if adapter is None:
        return 3 * forward
    injected = 3 * injection(c, adapter, image_rows + text_rows, reference_tokens)
    return (3 if base_trained else 2) * forward + injected + 3 * bank(adapter, reference_tokens)
