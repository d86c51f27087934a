"""What looks at a run every so many steps: sample grids and the loss on held-out rows."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from train.run import Run
from train.state import TrainState


class Evaluator(Protocol):
    """Judges the state after `step` steps. Called by all processes at the same step; what it returns goes into the metrics, so all
    that does not is its own to write."""

    def __call__(self, step: int, state: TrainState) -> dict[str, float]: ...


class Due(NamedTuple):
    """An evaluator, and how many steps lie between two of its calls."""

    every: int
    evaluate: Evaluator


def shipped(run: Run) -> list[Due]:
    """The evaluators that the config of `run` asks for. Raises `UserError` for what they cannot work with."""
    due, config = [], run.config
    if config.sample.every:
        from train.samples import Sampler

        due.append(Due(config.sample.every, Sampler(run)))
    if config.validation.every:
        from train.validation import Validation

        due.append(Due(config.validation.every, Validation(run)))
    return due
