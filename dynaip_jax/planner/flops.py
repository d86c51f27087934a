"""Floating-point operations by formula, since a compiler counts a scanned block once. Counts matrix products and attention at two
FLOPs per multiply-add; ignores norms and activations."""

from __future__ import annotations

from dynaip_jax.adapters.dynaip import DynaIPConfig
from dynaip_jax.families.base import Family


def injection(family: Family, adapter: DynaIPConfig, rows: int, reference_tokens: int, subjects: int = 1) -> int:
    """FLOPs of the reference attention in one forward pass on one sample."""
    return adapter.injected * 4 * rows * subjects * reference_tokens * family.sites.width


def bank(adapter: DynaIPConfig, reference_tokens: int, subjects: int = 1) -> int:
    """FLOPs of experts and K/V projections for one sample: once a picture, or once a training step."""
    h = adapter.hmoe
    experts = 3 * 2 * h.expert_width * (h.clip_width + h.width)
    projections = adapter.injected * 2 * 2 * h.width * adapter.num_heads * adapter.head_dim
    tokens = h.resampler_tokens or reference_tokens
    return subjects * (reference_tokens * experts + tokens * projections)


def training_step(
    family: Family,
    adapter: DynaIPConfig | None,
    image_rows: int,
    *,
    base_trained: bool,
) -> int:
    """FLOPs of one training step on one sample without recomputation: forward, gradients of activations, and gradients of the
    weights that are trained. A frozen base costs 2 forwards, a trained one 3, the bank 3."""
    forward = family.forward_flops(image_rows, family.text_rows)
    if adapter is None:
        return 3 * forward
    reference_tokens = family.config("clip_vision").tokens
    injected = 3 * injection(family, adapter, image_rows + family.text_rows, reference_tokens)
    return (3 if base_trained else 2) * forward + injected + 3 * bank(adapter, reference_tokens)
