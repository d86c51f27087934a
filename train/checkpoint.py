"""Checkpoints of a run: trained weights, their average, optimizer, step and data position, in `WORKDIR/checkpoints`.

Written by Orbax in the background and renamed when whole, so that a killed run leaves the previous ones as they were.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from dynaip_jax.errors import UserError
from train.state import TrainState
from train.workdir import disk_errors


def _below_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


class Checkpoints:
    """The checkpoints in a run's folder. The best (lowest running mean of the loss) and the latest `keep` are kept."""

    def __init__(self, workdir: epath.PathLike, keep: int):
        policies = checkpoint_managers.preservation_policy
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            create=True,
            cleanup_tmp_directories=True,
            best_fn=lambda metrics: metrics["loss"],
            best_mode="min",
            enable_async_checkpointing=True,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        )
        self.workdir = epath.Path(workdir)
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._all_but_late_writes
        for logger in map(logging.getLogger, ("absl", "asyncio")):  # Orbax raises what it also logs, with tracebacks
            logger.addFilter(_below_error)
        with disk_errors(workdir):
            self._manager = ocp.CheckpointManager((self.workdir / "checkpoints").absolute(), options=options)

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step with the lowest loss among those kept."""
        return self._manager.best_step() if self.steps() else None

    def mean_loss(self, step: int) -> float:
        """The running mean of the loss that was saved with `step`."""
        return self._manager.metrics(step)["loss"]

    def save(self, step: int, state: TrainState, data: Any, mean_loss: float) -> None:
        """Copies the state off the devices and writes it in the background. A full disk shows here or at the next call."""
        with disk_errors(self.workdir):
            args: dict[str, Any] = dict(
                state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave(data.get_state())
            )
            self._manager.save(step, args=ocp.args.Composite(**args), metrics=dict(loss=mean_loss), force=True)

    def restore(self, step: int, target: TrainState, data: Any = None) -> TrainState:
        """The state of `step`, in `target`'s shapes and shardings; sets `data`, if given, to go on where it was.

        Mesh and number of processes may be others than when it was saved. Raises `UserError` if it is damaged.
        """
        args: dict[str, Any] = dict(state=ocp.args.StandardRestore(target._asdict()), data=ocp.args.JsonRestore())
        try:
            saved = self._manager.restore(step, args=ocp.args.Composite(**args))
        except (OSError, ValueError, KeyError) as e:  # tensorstore's are ValueErrors
            raise UserError(
                f"{self.workdir / 'checkpoints' / str(step)}: cannot be read ({str(e)[:200]}); expected a whole checkpoint; "
                "delete this folder to go on from the one before it"
            ) from e
        if data is not None:
            data.set_state(saved["data"])
        return TrainState(**saved["state"])

    def wait(self) -> None:
        """Until all that was saved is on disk."""
        with disk_errors(self.workdir):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the background thread."""
        try:
            with disk_errors(self.workdir):
                self._manager.close()
        finally:
            sys.unraisablehook = self._unraisable

    def _all_but_late_writes(self, what: Any) -> None:
        """When a write fails, Orbax gives up the save, and each other write of it that ends later would print a traceback."""
        if str(what.exc_value) != "Event loop is closed":
            self._unraisable(what)
