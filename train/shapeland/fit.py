"""A small training loop for what is neither base nor adapter."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.checkpoint import Checkpoints
from train.config import OptimConfig
from train.optim import dotted
from train.state import TrainState, init_state, updated

Figures = dict[str, jax.Array]
Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, Figures]]  # (params, batch, key) -> (loss, figures to print)

WARMUP = 100  # steps at most
# Names of matrices, which have weight decay; not all of these networks name their axes.
MATRIX = re.compile(r"(^|\.)(kernel|class_kernel|embedding|see|read|heads\.-?\d+)$")
LOG_EVERY, SAVE_EVERY = 50, 250  # steps


def fit(
    folder: Path,
    params: Any,
    loss: Loss,
    batch_of: Callable[[int], Any],
    steps: int,
    rate: float,
    seed: int,
    ema: float = 0.995,
) -> Any:
    """Trains `params` for `steps` steps -> their moving average. `batch_of(step)`: the batch of a step.

    Checkpoints lie in `folder`. If one exists, training resumes from it.
    """
    optim = OptimConfig(rate=rate, warmup=min(WARMUP, steps // 10), decay_steps=max(steps, 1), final=0.02, ema=ema)
    names = (dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
    decayed = set(filter(MATRIX.search, names))
    checkpoints = Checkpoints(folder, keep=1)

    @partial(jax.jit, donate_argnums=0)
    def step_fn(state: TrainState, batch: Any) -> tuple[TrainState, Figures]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, figures), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        return updated(optim, state, grads, decayed), dict(loss=value) | figures

    try:
        state = init_state(optim, params)
        start = checkpoints.latest() or 0
        if start:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)
            state = checkpoints.restore(start, target, _Position())
        for step in range(start, steps):
            state, figures = step_fn(state, batch_of(step))
            done = step + 1
            if done % LOG_EVERY == 0 or done == steps:
                print(f"step {done}  " + "  ".join(f"{k} {float(v):.4f}" for k, v in figures.items()), file=sys.stderr)
            if done % SAVE_EVERY == 0 or done == steps:
                checkpoints.save(done, state, _Position(), float(figures["loss"]))
        return jax.tree.map(np.asarray, state.ema)
    finally:
        checkpoints.close()


def choose(seed: int, step: int, count: int, batch: int) -> np.ndarray:
    """Indices `[batch]` of the batch of `step` among `count` items."""
    return np.random.default_rng((seed, step)).choice(count, batch, replace=False)


class _Position:
    """Data whose batches are a function of the step: it has no state to keep."""

    def get_state(self) -> dict[str, int]:
        return {}

    def set_state(self, state: dict[str, int]) -> None:
        pass
