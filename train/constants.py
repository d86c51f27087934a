"""What stays the same in every step of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax

from dynaip_jax.adapters.dynaip import DynaIPConfig, abstract_adapter_params
from dynaip_jax.families.base import Family, Matrices
from dynaip_jax.layers.compute import Compute
from dynaip_jax.runtime.sharding import matrices
from train.config import OptimConfig
from train.optim import ADAPTER_MATRICES


@dataclass(frozen=True)
class Constants:
    """The constants of a step (hashable: it is a static argument)."""

    family: Family
    adapter: DynaIPConfig | None
    adapter_compute: Compute
    optim: OptimConfig
    accumulate: int
    guidance: float
    random_granularity: float
    time_mean: float
    time_std: float
    fixed_noise: bool
    seed: int

    @property
    def matrices(self) -> tuple[Matrices, ...]:
        """Parameters that Muon takes as matrices."""
        return (*self.family.matrices, *ADAPTER_MATRICES)

    @property
    def decayed(self) -> frozenset[str]:
        """Dotted names of all parameters with weight decay, of adapter and transformer."""
        return _matrices(self.family, self.adapter)

    def key(self, step: jax.Array, purpose: int) -> jax.Array:
        """The random key of a step; the same for all steps with `fixed_noise`."""
        key = jax.random.fold_in(jax.random.key(self.seed), purpose)
        return key if self.fixed_noise else jax.random.fold_in(key, step)


@lru_cache(maxsize=8)  # asked for whenever a step is traced
def _matrices(family: Family, adapter: DynaIPConfig | None) -> frozenset[str]:
    boxed: dict[str, Any] = dict(transformer=family.abstract_params("transformer", boxed=True))
    if adapter is not None:
        boxed["adapter"] = abstract_adapter_params(adapter, boxed=True)
    return matrices(boxed)
