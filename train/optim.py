"""The optimizer of a run: clipping, AdamW or Muon, warmup and cosine."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import jax
import optax

from dynaip_jax.families.base import Matrices
from train.config import OptimConfig

ADAPTER_MATRICES = (  # of an adapter: its banks and experts
    Matrices(r"'(double|single)'.*'(key|value)'", (1,), (2, 3)),
    Matrices(r"expert_.*kernel", (0,), (1,)),
)


def optimizer(
    c: OptimConfig, decayed: Collection[str], matrices: Sequence[Matrices] = ()
) -> optax.GradientTransformation:
    """Clips the global gradient norm, then moves parameters as `c.kind` says; `decayed`: dotted names of those with weight decay;
    `matrices`: those that Muon orthogonalises."""

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: dotted(path) in decayed, params)

    if c.kind == "adamw":
        inner = optax.adamw(schedule(c, c.rate), b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, mask=mask)
    else:
        inner = optax.contrib.muon(
            schedule(c, c.muon_rate), adam_learning_rate=schedule(c, c.rate), adam_b1=c.b1, adam_b2=c.b2,
            weight_decay=c.weight_decay, adam_weight_decay=c.weight_decay, weight_decay_mask=mask,
            muon_weight_dimension_numbers=lambda params: dimension_numbers(params, matrices),
        )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(c.clip), inner)


def dotted(path: Any) -> str:
    """The name of a leaf, "adapter.double.key"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def schedule(c: OptimConfig, rate: float) -> optax.Schedule:
    """Steps done -> learning rate: linear to `rate`, then a cosine to `c.final` of it."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, c.warmup, c.decay_steps, rate * c.final)


def learning_rates(c: OptimConfig, step: int) -> dict[str, float]:
    """The rate of each part of the optimizer in training step `step`, counted from 1."""
    rates = dict(learning_rate=c.rate) | (dict(muon_learning_rate=c.muon_rate) if c.kind == "muon" else {})
    return {name: float(schedule(c, rate)(step - 1)) for name, rate in rates.items()}


def dimension_numbers(params: Any, matrices: Sequence[Matrices]) -> Any:
    """For each parameter the axes that the first of `matrices` that matches its name says of it, None if none does."""

    def axes(path: Any, x: jax.Array) -> Any:
        name = jax.tree_util.keystr(path)
        for pattern, into, out in matrices:
            if re.search(pattern, name):
                return optax.contrib.MuonDimensionNumbers(into, tuple(axis for axis in out if axis < x.ndim))
        return None

    return jax.tree_util.tree_map_with_path(axes, params)
