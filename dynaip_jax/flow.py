"""Rectified flow: the schedule and the Euler sampler, functions of (velocity, x, schedule) with no model inside.

Convention (FLUX): x_t = (1 - t) x_0 + t ε, velocity v = ε - x_0, sampling runs from t = 1 (noise) to t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynaip_jax import schema


@dataclass(frozen=True)
class ScheduleConfig:
    """How sampling times are shifted with resolution. `dynamic`: mu is linear in the number of packed tokens; otherwise
    the fixed factor `shift` is used (schnell: 1, no shift). Field values: diffusers' `scheduler_config.json` of FLUX.1-dev. Raises `ValueError` for numbers out of range."""

    dynamic: bool = True
    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    shift: float = 1.0

    def __post_init__(self) -> None:
        shifts = dict.fromkeys(("base_shift", "max_shift"), (-20.0, 20.0))
        schema.check(self, shift=(1e-6, 1e6), **shifts)
        if self.dynamic and self.base_tokens >= self.max_tokens:
            raise ValueError(f"base_tokens {self.base_tokens}: expected fewer than max_tokens {self.max_tokens}")

    def factor(self, tokens: int) -> float:
        """The shift e^mu for an image of `tokens` packed tokens (the true count; see FLUX `sampling.get_schedule`)."""
        if not self.dynamic:
            return self.shift
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_shift + slope * (tokens - self.base_tokens))


def shift_times(t, factor):
    """t -> e^mu / (e^mu + 1/t - 1), written so that t = 0 stays 0; `factor` is e^mu."""
    return factor * t / (1 + (factor - 1) * t)


def schedule(steps: int, tokens: int, config: ScheduleConfig) -> np.ndarray:
    """Times `[steps + 1]`, float32, from 1 down to 0."""
    return shift_times(np.linspace(1.0, 0.0, steps + 1), config.factor(tokens)).astype(np.float32)


def sample_times(key: jax.Array, batch: int, factor: float, *, mean: float = 0.0, std: float = 1.0) -> jax.Array:
    """Training times `[batch]`: sigmoid of N(mean, std), shifted by `factor` = e^mu as the sampler's are."""
    return shift_times(jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch,))), factor)


def interpolate(clean: jax.Array, noise: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x_t = (1 - t) x_0 + t ε and the velocity v = ε - x_0, both `[b, ...]`, for times `[b]`."""
    t = t.reshape(-1, *[1] * (clean.ndim - 1))
    return (1 - t) * clean + t * noise, noise - clean


def euler(
    velocity: Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    times: jax.Array,
    state: Any = None,
) -> tuple[jax.Array, Any]:
    """Integrates dx = v dt over `times` `[n + 1]` in one `lax.scan`, in float32: x += (t_next - t) v, where
    v, state = `velocity(x, t, step / n, state)`. Returns x and the last state."""
    n = len(times) - 1

    def step(carry, now):
        (x, state), (t, t_next, index) = carry, now
        v, state = velocity(x, t, index / n, state)
        return (x + (t_next - t) * v.astype(jnp.float32), state), None

    carry, _ = jax.lax.scan(step, (x.astype(jnp.float32), state), (times[:-1], times[1:], jnp.arange(n)))
    return carry
