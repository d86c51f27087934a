"""Softmax attention: the one door to every kernel."""

from __future__ import annotations

import jax
from jaxtyping import Float

from dynaip_jax.layers import kernels
from dynaip_jax.types import Tensor


def attention(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b m h d"],
    v: Float[Tensor, "b m h e"],
    *,
    bias: Float[Tensor, "batch heads n m"] | None = None,
    scale: float | None = None,
    kernel: str = "auto",
) -> Float[jax.Array, "b n h e"]:
    """Softmax attention: `q` `[b, n, h, d]`, `k`, `v` `[b, m, h, d]` -> `[b, n, h, d]`; the one door to every kernel.

    `bias` is added to the logits, `[1 or b, h or 1, n, m]`; `scale` defaults to 1/sqrt(d). The softmax runs in float32.
    `kernel`: a name of `choices.KERNELS`. "auto" takes cuDNN's or Pallas' flash attention where one fits, on a CPU one head at a
    time, and XLA's products otherwise; a name forces it, and is a `UserError` where it does not fit.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = kernels.choose(kernel, q, k, v, bias)
    if name in kernels.PLATFORM:
        return getattr(kernels, name)(q, k, v, scale)
    return getattr(kernels, name)(q, k, v, scale, bias)
