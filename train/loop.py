"""The training loop: batches in, steps, metrics, checkpoints, evaluators, and a clean way out."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dynaip_jax.errors import UserError
from train.assemble import assembled
from train.config import TrainConfig
from train.metrics import Meter, Metrics, say
from train.opening import opening
from train.overview import overview
from train.profiling import Profile
from train.run import Run
from train.state import TrainState
from train.step import Features
from train.stopping import Stop
from train.workdir import disk_errors

STEP = "the step that runs, and its checkpoint"  # what a signal waits for


def train(
    config: TrainConfig,
    workdir: epath.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    resume_from: int | None = None,
    stop: Stop | None = None,
) -> TrainState:
    """Trains until `config.steps` steps are done, or SIGTERM or SIGINT is received; saves and returns the state then.

    `resume_from`: the checkpoint to go on from, in place of the latest; later ones are set aside. `stop`: heeds the signals already.
    Raises `UserError` for a configuration that cannot run here, and for a loss that is not finite; `Stopped` if a signal comes before
    the first step is done.
    """
    with contextlib.ExitStack() as parts:
        stop = stop or parts.enter_context(Stop())
        run = parts.enter_context(
            assembled(config, workdir, resume=resume, overwrite=overwrite, resume_from=resume_from)
        )
        state, start = run.first_state()
        if resume and not start:
            say(f"no checkpoint in {run.workdir}: starts with step 1")
        parts.callback(gc.unfreeze)
        metrics = parts.enter_context(Metrics(run.workdir, start, write=jax.process_index() == 0, steps=config.steps))
        profile = parts.enter_context(Profile(config.profile, run.workdir / "profile"))
        return loop(run, state, start, metrics, profile, stop)


def loop(run: Run, state: TrainState, start: int, metrics: Metrics, profile: Profile, stop: Stop) -> TrainState:
    """Trains `state`, which has done `start` steps. Steps count from 1."""
    config, checkpoints = run.config, run.checkpoints
    if start >= config.steps:
        say(f"step {start} of {config.steps} is done already; raise --steps to go on")
    else:
        say(overview(run, state))
        say(opening(run, start))
    _, step_fn = run.programs
    meter = Meter(run)
    running = checkpoints.mean_loss(start) if start else math.nan  # of the loss, for choosing the best checkpoint
    unread = None
    profile.after(start, state)

    for step, (features, rows) in enumerate(features_from(run, start, meter), start + 1):
        with jax.set_mesh(run.mesh):
            state, values = step_fn(run.constants, state, run.base, features)
        stop.waits_for = STEP
        if step == start + 1:
            # What tracing left behind stays: going through it again would hold up a later step, or a save.
            gc.collect()
            gc.freeze()
        # The loss of the step before is read while this one runs, so that looking never makes the devices wait.
        if unread is not None:
            check_finite(run, *unread)
        unread = (step, values, rows)
        meter.count(features.latents.shape)
        profile.after(step, values)

        last = step == config.steps or stop.agreed(step)
        log = step % config.log_every == 0 or last
        save = step % config.save_every == 0 or last
        if log or save:
            check_finite(run, *unread)
            loss = float(values["loss"])
            running = loss if math.isnan(running) else 0.9 * running + 0.1 * loss
        if log:
            metrics.write(step, values, meter.read(), config.optim)
        if save:
            checkpoints.save(step, state, run.data, running)
        for due in run.evaluators:
            if step % due.every == 0:
                stop.waits_for = f"what is drawn and measured at step {step}, another step, and its checkpoint"
                with disk_errors(run.workdir):
                    metrics.add(step, due.evaluate(step, state))
                meter.pause()
        if last:
            break

    stop.waits_for = "the last checkpoint to be on disk"
    checkpoints.wait()
    if int(state.step) >= config.steps:
        stop.finished()
    if stop.asked:
        say(f"stopped by {stop.asked} after step {int(state.step)}; saved; go on with --resume")
    return state


def features_from(run: Run, start: int, meter: Meter) -> Iterator[tuple[Features, np.ndarray]]:
    """The features of each step after `start` to the last, and the dataset rows of this process in it."""
    config = run.config
    features_fn, _ = run.programs
    batch, features = None, None
    for done in range(start, config.steps):
        if batch is None or not config.fixed_batch:
            began = time.perf_counter()
            local = next(run.data)
            meter.waited += time.perf_counter() - began
            batch = run.on_mesh(local, config.batch)
        if features is None or not (config.fixed_batch and config.fixed_noise):
            with jax.set_mesh(run.mesh):
                features = features_fn(run.constants, run.frozen, batch, jnp.int32(done))
        yield features, local.row


def check_finite(run: Run, step: int, values: dict[str, Any], rows: np.ndarray) -> None:
    """Raises `UserError` that names the `rows` of a step if its loss or gradient is not finite."""
    for name, value in (("loss", float(values["loss"])), ("gradient norm", float(values["grad_norm"]))):
        if not math.isfinite(value):
            numbers = run.dataset.numbers[rows].tolist()
            raise UserError(
                f"step {step}: the {name} is {value}; batch rows {numbers}; expected a finite number; look at those rows, "
                "lower `optim.rate`, or pass `dtype` float32; the last checkpoint is from before this step"
            )
