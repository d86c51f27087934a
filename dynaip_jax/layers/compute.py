"""How a network is computed, apart from what it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dynaip_jax import choices

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class Compute:
    """`dtype`: of activations and matrix products; `param_dtype`: of the parameters that `init` makes; `remat`: a key of
    `REMAT_POLICIES`; `attention`: one of `choices.KERNELS`; `weights`: precision of the transformer's blocks, one of
    `choices.WEIGHTS` (see `families.quantize`). Raises `ValueError` for a choice that does not exist."""

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    weights: str = "full"

    def __post_init__(self) -> None:
        for name, allowed in dict(remat=choices.REMATS, attention=choices.KERNELS, weights=choices.WEIGHTS).items():
            choices.check(name, getattr(self, name), allowed)

    @property
    def dtypes(self) -> dict[str, Any]:
        """`dtype` and `param_dtype`, as modules take them."""
        return dict(dtype=self.dtype, param_dtype=self.param_dtype)
