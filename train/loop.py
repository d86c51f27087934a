"""The training loop: batches in, steps, metrics, checkpoints, sample grids, and a clean way out."""

from __future__ import annotations

import gc
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynaip_jax.data.loader import make_loader
from dynaip_jax.errors import UserError
from dynaip_jax.planner import chips, flops
from dynaip_jax.runtime.sharding import batch_positions, batch_sharding, make_mesh
from train import assemble as models_
from train.checkpoint import Checkpoints, check_workdir, claim_workdir, disk_errors
from train.config import TrainConfig
from train.step import TIME_BUCKETS, TrainState, init_state

METRICS_FILE = "metrics.jsonl"


def train(config: TrainConfig, workdir: Path, *, resume: bool = False, overwrite: bool = False) -> TrainState:
    """Trains until `config.steps` steps are done, or SIGTERM or SIGINT is received; saves and returns the state then.

    Raises `UserError` for a configuration that cannot run here, and for a loss that is not finite.
    """
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    bundle = models_.open_bundle(config)
    models_.make_recipe(config, bundle)
    check_workdir(workdir, config, bundle.fingerprint, resume=resume, overwrite=overwrite)
    encoders = not config.data.features or bool(config.sample.every)
    models = models_.load(config, bundle, mesh, encoders=encoders)
    data = make_loader(
        config.data,
        models.tokenizers,
        global_batch=config.batch,
        positions=batch_positions(mesh, config.batch),
        encoders=models_.encoder_identity(bundle, config),
    )
    sampler = _sampler(config, models, mesh, workdir)
    main = jax.process_index() == 0
    _barrier("all have checked")
    if main:
        claim_workdir(workdir, config, bundle.fingerprint, overwrite=overwrite)
    _barrier("workdir")
    checkpoints = Checkpoints(workdir, config.keep)
    try:
        start = checkpoints.latest()
        if start is None:
            state = models_.fresh_state(config, models)
        else:
            target = jax.eval_shape(lambda: init_state(config.optim, models_.fresh_params(config, models.recipe)))
            target = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), target, models.state_shardings
            )
            state = checkpoints.restore(start, target, None if config.fixed_batch else data)
        with Metrics(workdir, start or 0, write=main) as metrics, _Stop() as stop:
            return _run(config, mesh, models, data, checkpoints, state, start or 0, metrics, stop, sampler)
    finally:
        gc.unfreeze()
        data.close()
        checkpoints.close()


def _run(
    config: TrainConfig,
    mesh: Mesh,
    models: models_.Models,
    data: Any,
    checkpoints: Checkpoints,
    state: TrainState,
    start: int,
    metrics: Metrics,
    stop: _Stop,
    sampler: Callable[[int, TrainState], None] | None,
) -> TrainState:
    split = batch_sharding(mesh)
    features_fn, step_fn = models_.step_functions(mesh, models.state_shardings)
    base = {k: v for k, v in models.frozen.items() if k == "transformer"}
    meter = _Meter(config, models, mesh)
    batch, features, watched = None, None, None
    running = checkpoints.mean_loss(start) if start else math.nan  # of the loss, for choosing the best checkpoint
    if start >= config.steps:
        _say(f"step {start} of {config.steps} is done already; raise --steps to go on")
    for step in range(start, config.steps):
        began = time.perf_counter()
        if batch is None or not config.fixed_batch:
            local = next(data)
            meter.waited += time.perf_counter() - began
            rows = local.row
            batch = jax.tree.map(
                lambda x: jax.make_array_from_process_local_data(split, x, (config.batch, *x.shape[1:])), local
            )
        if features is None or not (config.fixed_batch and config.fixed_noise):
            with jax.set_mesh(mesh):
                features = features_fn(models.recipe, models.frozen, batch, jnp.int32(step))
        with jax.set_mesh(mesh):
            state, values = step_fn(models.recipe, state, base, features)
        if step == start:
            # What tracing left behind stays: going through it again would hold up a later step, or a save.
            gc.collect()
            gc.freeze()
        done = step + 1
        # The loss of the step before is read while this one runs, so that looking never makes the devices wait.
        if watched is not None:
            _check_finite(*watched, data)
        watched = (done, values, rows)
        meter.count(features.latents.shape)
        last = done == config.steps or stop.agreed(done)
        log = done % config.log_every == 0 or last
        save = done % config.save_every == 0 or last
        if log or save:
            _check_finite(*watched, data)
            loss = float(values["loss"])
            running = loss if math.isnan(running) else 0.9 * running + 0.1 * loss
        if log:
            metrics.write(done, values, meter.read())
        if save:
            checkpoints.save(done, state, data, running)
        if sampler is not None and (done % config.sample.every == 0):
            with disk_errors(checkpoints.workdir):
                sampler(done, state)
            meter.pause()
        if last:
            break
    checkpoints.wait()
    if stop.asked:
        _say(f"stopped by {stop.asked} after step {int(state.step)}; saved; go on with --resume")
    return state


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr)


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises `UserError` if the mesh does not divide the batch."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    each = config.batch // config.accumulate
    if each % ways:
        raise UserError(
            f"--batch {config.batch} in {config.accumulate} micro-batches of {each}: not divisible by the mesh's data x fsdp = "
            f"{ways}; choose a multiple of {ways * config.accumulate}"
        )


def _check_finite(step: int, values: dict[str, Any], rows: np.ndarray, data: Any) -> None:
    for name, value in (("loss", float(values["loss"])), ("gradient norm", float(values["grad_norm"]))):
        if not math.isfinite(value):
            numbers = data.reader.dataset.numbers[rows].tolist()
            raise UserError(
                f"step {step}: the {name} is {value}; batch rows {numbers}; expected a finite number; look at those rows, "
                "lower --optim.rate, or pass --dtype float32; the last checkpoint is from before this step"
            )


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


class _Stop:
    """Notes SIGTERM (preemption) and, in a single process, SIGINT while the block runs, instead of ending at once.

    With several processes JAX notes SIGTERM (to any of them), and finds a step that all can reach without waiting for each other
    at every one.
    """

    def __init__(self) -> None:
        self.asked = ""

    def __enter__(self) -> _Stop:
        noted = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._before = {s: signal.signal(s, self._note) for s in noted}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.asked = signal.Signals(number).name

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`; all processes get the same answer."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.asked = signal.SIGTERM.name
        return bool(self.asked)


class _Meter:
    """Throughput since the last reading: images/s, FLOP/s by formula, and how long the loop waited for data."""

    def __init__(self, config: TrainConfig, models: models_.Models, mesh: Mesh):
        self._config, self._recipe, self._devices = config, models.recipe, mesh.devices.size
        self._chip = chips.chip(mesh.devices.flat[0].device_kind)
        self.waited = 0.0
        self.pause()

    def pause(self) -> None:
        """Starts counting anew."""
        self._since, self._steps, self._flops, self.waited = time.perf_counter(), 0, 0, 0.0

    def count(self, shape: tuple[int, ...]) -> None:
        """Counts a step over latents of shape `[b, c, h, w]`."""
        family, base_trained = self._recipe.family, self._config.trainable != "adapter"
        each = flops.training_step(family, self._recipe.adapter, family.tokens(shape), base_trained=base_trained)
        self._steps += 1
        self._flops += self._config.batch * each

    def read(self) -> dict[str, float | None]:
        """The figures since the last reading."""
        seconds = time.perf_counter() - self._since
        rate = self._flops / seconds / self._devices
        figures = dict(
            images_per_second=self._steps * self._config.batch / seconds,
            step_seconds=seconds / self._steps,
            data_wait=self.waited / seconds,
            flops_per_second_per_device=rate,
            mfu=None if self._chip is None else rate / self._chip.flops,
        )
        self.pause()
        return figures


class Metrics:
    """`metrics.jsonl` and TensorBoard events in the run's folder, and a line on the terminal.

    On resumption at step `start` the lines of later steps, from before a kill, are dropped.
    """

    def __init__(self, workdir: Path, start: int, *, write: bool):
        self._workdir, self._start, self._write = workdir, start, write

    def __enter__(self) -> Metrics:
        if self._write:
            path = self._workdir / METRICS_FILE
            with disk_errors(self._workdir):
                kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= self._start]
                partial = path.with_suffix(".partial")
                partial.write_text("".join(f"{line}\n" for line in kept))
                partial.rename(path)
                self._file = open(path, "a")
                self._board = _Board(self._workdir / "tensorboard", self._start + 1)
        return self

    def __exit__(self, *error: object) -> None:
        if self._write:
            with disk_errors(self._workdir):
                self._file.close()
                self._board.close()

    def write(self, step: int, values: dict[str, Any], figures: dict[str, float | None]) -> None:
        """One line with `step`, `loss` and the rest."""
        line: dict[str, Any] = dict(step=step, loss=float(values["loss"]), grad_norm=float(values["grad_norm"]))
        quarters = np.asarray(values["loss_by_time"])
        line |= {f"loss_t{n}of{TIME_BUCKETS}": _finite(x) for n, x in enumerate(quarters, 1)}
        if "routing" in values:
            low, mid, high = np.asarray(values["routing"]).tolist()
            line |= dict(routing_low=low, routing_mid=mid, routing_high=high)
            line |= {k: float(values[k]) for k in ("key_rms", "value_rms")}
        line |= figures
        if not self._write:
            return
        with disk_errors(self._workdir):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._board.write(step, {k: v for k, v in line.items() if k != "step" and v is not None})
        print(
            f"step {step}  loss {line['loss']:.4f}  grad {line['grad_norm']:.3g}  "
            f"{line['images_per_second']:.3g} images/s  waiting for data {line['data_wait']:.1%}",
            file=sys.stderr,
        )


class _Board:
    """TensorBoard events in `folder`; those of step `start` and later, of before a kill, are marked as void.

    Written and flushed here, not in a thread: so that a full disk shows as an error of the call.
    """

    def __init__(self, folder: Path, start: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        mark = Event(wall_time=time.time(), step=start, session_log=SessionLog(status=SessionLog.START))
        self._writer.write_event(mark)
        self._writer.flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file that are whole JSON; a kill may have cut the last one."""
    lines = path.read_text().splitlines() if path.is_file() else []
    whole = []
    for line in lines:
        try:
            json.loads(line)
        except ValueError:
            break
        whole.append(line)
    return whole


def _sampler(
    config: TrainConfig, models: models_.Models, mesh: Mesh, workdir: Path
) -> Callable[[int, TrainState], None] | None:
    if not config.sample.every:
        return None
    from train.samples import Sampler

    return Sampler(config, models, mesh, workdir).draw
