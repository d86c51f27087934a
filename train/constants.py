"""What stays the same in every step of a run."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from dynaip_jax.adapters.dynaip import DynaIPConfig
from dynaip_jax.families.base import Family, Matrices
from dynaip_jax.layers.compute import Compute
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

    def key(self, step: jax.Array, purpose: int) -> jax.Array:
        """The random key of a step; the same for all steps with `fixed_noise`."""
        key = jax.random.fold_in(jax.random.key(self.seed), purpose)
        return key if self.fixed_noise else jax.random.fold_in(key, step)
