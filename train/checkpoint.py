"""Checkpoints of a run: trained weights, their average, optimizer, step and data position, in `WORKDIR/checkpoints`.

Written by Orbax in the background and renamed when whole, so that a killed run leaves the previous ones as they were.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from dynaip_jax.errors import UserError
from train.config import TrainConfig, differing, from_dict, to_dict
from train.step import TrainState

RUN_FILE = "run.json"


def check_workdir(workdir: Path, config: TrainConfig, fingerprint: str, *, resume: bool, overwrite: bool) -> None:
    """Whether a run may start in `workdir`; changes nothing.

    Raises `UserError` if the folder holds a run and neither `resume` nor `overwrite` is said, if it holds something else,
    and if config or base differ from those of the run to be resumed.
    """
    run = workdir / RUN_FILE
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir}: is a file; expected a folder; choose another name")
    if run.is_file() and not (resume or overwrite):
        raise UserError(f"--workdir {workdir}: holds a run; pass --resume to go on with it or --overwrite to delete it")
    if not run.is_file() and workdir.is_dir() and {x.name for x in workdir.iterdir()} - {_partial(run).name}:
        raise UserError(f"--workdir {workdir}: holds files that are not a run's; choose an empty or new folder")
    if run.is_file() and resume:
        try:
            old = json.loads(run.read_text())
            saved = to_dict(from_dict(old["config"]))  # fields that came later have their defaults
            fields, base = differing(saved, to_dict(config)), old["base"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{run}: not readable ({e}); expected the run's config; start again with --overwrite"
            ) from e
        if base != fingerprint:
            raise UserError(
                f"--resume {workdir}: trained on another base (fingerprint {base[:12]}, this one has {fingerprint[:12]}); "
                "pass the --bundle of that run"
            )
        if fields:
            raise UserError(
                f"--resume {workdir}: config differs: {'; '.join(fields)}; use the run's own, or a new --workdir"
            )


def claim_workdir(workdir: Path, config: TrainConfig, fingerprint: str, *, overwrite: bool) -> None:
    """Makes a checked `workdir` ready: deletes the run in it if `overwrite`, and writes `run.json` (config, base fingerprint).

    `run.json` is there throughout, so that a kill in between leaves a run, whole or with nothing done yet.
    """
    import shutil

    run = workdir / RUN_FILE
    with disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        for path in workdir.iterdir():
            if overwrite and path != run:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        text = json.dumps(dict(base=fingerprint, config=to_dict(config)), indent=2)
        _partial(run).write_text(text + "\n")
        _partial(run).rename(run)


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


@contextlib.contextmanager
def disk_errors(workdir: Path) -> Iterator[None]:
    """A full or unwritable disk becomes a `UserError` that names `workdir`; earlier checkpoints stay whole."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"--workdir {workdir}: cannot be written ({e.strerror or e}); the last whole checkpoint is kept; free space or "
            "choose another disk, then --resume"
        ) from e
    except Exception as e:  # Orbax and tensorstore wrap the operating system's words in errors of their own
        if any(
            words in str(e)
            for words in ("No space left", "RESOURCE_EXHAUSTED: Error writing", "Disk quota", "File too large")
        ):
            raise UserError(
                f"--workdir {workdir}: the disk is full; the last whole checkpoint is kept; free space, then --resume"
            ) from e
        raise


def _below_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


class Checkpoints:
    """The checkpoints in a run's folder. The best (lowest running mean of the loss) and the latest `keep` are kept."""

    def __init__(self, workdir: Path, keep: int):
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
        self.workdir = workdir
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._all_but_late_writes
        for logger in map(logging.getLogger, ("absl", "asyncio")):  # Orbax raises what it also logs, with tracebacks
            logger.addFilter(_below_error)
        with disk_errors(workdir):
            self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

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
            found = self._manager.restore(step, args=ocp.args.Composite(**args))
        except (OSError, ValueError, KeyError) as e:  # tensorstore's are ValueErrors
            raise UserError(
                f"{self.workdir / 'checkpoints' / str(step)}: cannot be read ({str(e)[:200]}); expected a whole checkpoint; "
                "delete this folder to go on from the one before it"
            ) from e
        if data is not None:
            data.set_state(found["data"])
        return TrainState(**found["state"])

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
