"""Checkpoints of a run: trained weights, their average, optimizer, step and data position, in `WORKDIR/checkpoints`.

Written by Orbax in the background, with checksums, and renamed when whole, so that a killed run leaves the previous ones as they were. In a
bucket, which renames nothing, a file that is written last ends each checkpoint, and is removed first.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from dynaip_jax.errors import UserError
from dynaip_jax.storage.bundle import is_late
from dynaip_jax.storage.folders import absolute, as_path, is_bucket
from train.checksums import damage, write_checksums
from train.state import TrainState
from train.stopping import barrier
from train.workdir import CHECKPOINTS, DISCARDED, disk_errors, remove_checkpoint, steps_in


def _of_use(record: logging.LogRecord) -> bool:
    """Not what Orbax also raises, with tracebacks, nor its advice to save less often."""
    return record.levelno < logging.ERROR and not str(record.msg).startswith("Waiting for previous save")


class Checkpoints:
    """The checkpoints in a run's folder. The best (lowest running mean of the loss) and the latest `keep` are kept.

    `reading`: nothing is written, and what another process is just writing stays. Raises `UserError` if the figures of a checkpoint,
    by which the best is chosen, cannot be read.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 1, *, reading: bool = False):
        policies = checkpoint_managers.preservation_policy
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        self.workdir, self._reading, self._keep = epath.Path(workdir), reading, keep
        self._folder, self._saving = epath.Path(absolute(self.workdir / CHECKPOINTS)), 0
        options = ocp.CheckpointManagerOptions(
            create=not reading,
            cleanup_tmp_directories=not reading,
            todelete_subdir=DISCARDED,  # moved in one step, then deleted; Orbax: not in buckets
            lightweight_initialize=reading,  # figures are read when they are asked for
            best_fn=lambda metrics: metrics["loss"],
            best_mode="min",
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._sum_up),
            preservation_policy=policies.PreserveAll()
            if is_bucket(workdir)
            else policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        )
        for step in () if reading else steps_in(workdir):
            self.mean_loss(step)
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._all_but_late_ones
        for logger in map(logging.getLogger, ("absl", "asyncio")):
            logger.addFilter(_of_use)
        with disk_errors(workdir):
            self._manager = ocp.CheckpointManager(self._folder, options=options)
            self._discard()

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step with the lowest loss among those kept."""
        return min(self.steps(), key=self.mean_loss, default=None)

    def mean_loss(self, step: int) -> float:
        """The running mean of the loss that was saved with `step`. Raises `UserError` if it cannot be read."""
        file = self._folder / str(step) / "metrics" / "metrics"
        try:
            return float(json.loads(file.read_text())["loss"])
        except FileNotFoundError as e:
            raise self._damaged(step, "metrics/metrics is missing") from e
        except Exception as e:  # whatever stands there
            raise self._damaged(step, f"metrics/metrics cannot be read ({str(e)[:80]})") from e

    def save(self, step: int, state: TrainState, data: Any, mean_loss: float) -> None:
        """Copies the state off the devices and writes it in the background. A full disk shows here or at the next call."""
        with disk_errors(self.workdir):
            self._manager.wait_until_finished()
            self._discard()
            self._saving = step
            args: dict[str, Any] = dict(
                state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave(data.get_state())
            )
            self._manager.save(step, args=ocp.args.Composite(**args), metrics=dict(loss=mean_loss), force=True)

    def restore(self, step: int, target: TrainState, data: Any = None) -> TrainState:
        """The state of `step`, in `target`'s shapes and shardings; sets `data`, if given, to go on where it was.

        Mesh and number of processes may be others than when it was saved. Raises `UserError` if it is damaged.
        """
        args: dict[str, Any] = dict(state=ocp.args.StandardRestore(target._asdict()), data=ocp.args.JsonRestore())
        if jax.process_index() == 0:  # one reads for all
            if found := damage(as_path(self._folder / str(step))):
                raise self._damaged(step, found)
        try:
            saved = self._manager.restore(step, args=ocp.args.Composite(**args))
            restored, position = TrainState(**saved["state"]), saved["data"]
        except Exception as e:  # Orbax, tensorstore and JSON each have their own
            reason = " ".join(str(e).split())[:100] or type(e).__name__
            raise self._damaged(step, f"cannot be read ({reason})") from e
        if data is not None:
            data.set_state(position)
        return restored

    def _damaged(self, step: int, found: str) -> UserError:
        others = [other for other in reversed(steps_in(self.workdir)) if other != step]
        older = [other for other in others if other < step]
        if others and others[0] > step and not self._reading:
            remedy = f"move this folder away to go on from {others[0]}"
        elif self._reading:
            remedy = f"pass `step` {others[0]}" if others else "there is no other"
        elif older:
            remedy = f"go on from an older one with `resume_from` {older[0]}"
        else:
            remedy = "there is no older one: start anew with `overwrite`, or in another `workdir`"
        return UserError(f"{self.workdir / CHECKPOINTS / str(step)}: {found}; expected a whole checkpoint; {remedy}")

    def _sum_up(self) -> None:
        """Called, in the first process, when a checkpoint is written and not yet renamed, or marked as whole."""
        folder = as_path(self._folder)
        if not isinstance(folder, Path):
            write_checksums(folder / str(self._saving))
            return
        for unnamed in folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
            write_checksums(unnamed)

    def _discard(self) -> None:
        if self._reading:
            return
        if is_bucket(self._folder):
            self._discard_in_bucket()
        elif jax.process_index() == 0 and (discarded := self._folder / DISCARDED).exists():
            discarded.rmtree()

    def _discard_in_bucket(self) -> None:
        """Deletes what is no longer kept; Orbax would do it file by file, so that a kill leaves half a checkpoint that looks complete."""
        steps = self.steps()
        surplus = set(steps[: -self._keep]) - {self.best()}
        if surplus:
            barrier("all know what is no longer kept")
            for step in surplus if jax.process_index() == 0 else ():
                remove_checkpoint(self._folder / str(step))
            barrier("it is gone")
            self._manager.reload()

    def wait(self) -> None:
        """Until all that was saved is on disk."""
        with disk_errors(self.workdir):
            self._manager.wait_until_finished()
            self._discard()

    def close(self) -> None:
        """Waits, then ends the background thread."""
        try:
            with disk_errors(self.workdir):
                self._manager.close()
                if not is_bucket(self._folder):  # there others would be waited for, which may have failed
                    self._discard()
        finally:
            sys.unraisablehook = self._unraisable

    def _all_but_late_ones(self, what: Any) -> None:
        """When a read or write fails, Orbax gives up, and each other one that ends later would print a traceback."""
        if not is_late(what.exc_value):
            self._unraisable(what)
