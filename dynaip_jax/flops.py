"""Floating-point operations by formula (a compiler's count takes a scanned block once), and what devices can do."""

from __future__ import annotations

from dynaip_jax.adapter.dynaip import DynaIPConfig
from dynaip_jax.models.flux import FluxConfig

PEAK = {  # dense bfloat16 FLOP/s a device, from the makers' data sheets; key: part of jax's device_kind
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "v6 lite": 918e12,
    "v5 lite": 197e12,
    "v5p": 459e12,
    "v4": 275e12,
}


def peak(device_kind: str) -> float | None:
    """FLOP/s of a device in bfloat16, or None if it is not in the table."""
    return next((flops for kind, flops in PEAK.items() if kind.lower() in device_kind.lower()), None)


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
