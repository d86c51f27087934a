"""What looks at a run every so many steps: `samples.Sampler` and `validation.Validation` are shipped."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from train.state import TrainState


class Evaluator(Protocol):
    """Judges the state after `step` steps. Called by all processes at the same step; what it returns goes into the metrics, so all
    that does not is its own to write."""

    def __call__(self, step: int, state: TrainState) -> dict[str, float]: ...


class Due(NamedTuple):
    """An evaluator, and how many steps lie between two of its calls."""

    every: int
    evaluate: Evaluator
