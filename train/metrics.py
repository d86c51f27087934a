"""What a run tells of itself: metrics.jsonl, TensorBoard events, lines on the terminal, and its throughput."""

from __future__ import annotations

import datetime
import json
import math
import os
import socket
import struct
import sys
import time
from typing import Any

import jax
import numpy as np
from etils import epath

from dynaip_jax.planner import chips
from dynaip_jax.storage.folders import is_bucket
from train.config import OptimConfig
from train.optim import learning_rates
from train.run import Run
from train.step import TIME_BUCKETS
from train.workdir import disk_errors, write_whole

METRICS_FILE = "metrics.jsonl"


def say(line: str) -> None:
    """A line on stderr, from the first process alone."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr)


class Meter:
    """Throughput since the last reading: images/s, FLOP/s by formula, and how long the loop waited for data.

    Steps are global, so that their time is that of every process; data is waited for by each, and the longest wait counts.
    """

    def __init__(self, run: Run):
        self._run, self._devices = run, run.mesh.devices.size
        self._chip = chips.chip(run.mesh.devices.flat[0].device_kind)
        self.waited = 0.0
        self.pause()

    def pause(self) -> None:
        """Starts counting anew."""
        self._since, self._steps, self._flops, self.waited = time.perf_counter(), 0, 0, 0.0

    def count(self, shape: tuple[int, ...]) -> None:
        """Counts a step over latents of shape `[b, c, h, w]`."""
        self._steps += 1
        self._flops += self._run.config.batch * self._run.flops(self._run.constants.family.tokens(shape))

    def read(self) -> dict[str, float | None]:
        """The figures since the last reading. All processes call it at the same step."""
        seconds = time.perf_counter() - self._since
        rate = self._flops / seconds / self._devices
        figures = dict(
            images_per_second=self._steps * self._run.config.batch / seconds,
            step_seconds=seconds / self._steps,
            data_wait=_largest(self.waited / seconds),
            flops_per_second_per_device=rate,
            mfu=None if self._chip is None else rate / self._chip.flops,
        )
        self.pause()
        return figures


class Metrics:
    """`metrics.jsonl` and TensorBoard events in the run's folder, and a line on the terminal.

    `steps`: of the whole run, for saying what is left of it. On resumption at step `start` the lines of later steps, from before a
    kill, are dropped; damaged ones among the others are told of.
    """

    def __init__(self, workdir: epath.Path, start: int, *, write: bool, steps: int | None = None):
        self._workdir, self._start, self._steps, self._write = workdir, start, steps, write

    def __enter__(self) -> Metrics:
        if self._write:
            path = self._workdir / METRICS_FILE
            with disk_errors(self._workdir):
                self._file = GrowingFile(path, "".join(f"{line}\n" for line in _kept_lines(path, self._start)).encode())
                self._board = Board(self._workdir / "tensorboard", self._start + 1)
        return self

    def __exit__(self, *error: object) -> None:
        if self._write:
            with disk_errors(self._workdir):
                self._file.close()
                self._board.close()

    def write(self, step: int, values: dict[str, Any], figures: dict[str, float | None], optim: OptimConfig) -> None:
        """One line with `step`, `loss` and the rest. `values`: the metrics of `train_step`; `figures`: of a `Meter`."""
        line: dict[str, Any] = dict(loss=float(values["loss"]), grad_norm=float(values["grad_norm"]))
        quarters = np.asarray(values["loss_by_time"])
        line |= {f"loss_t{n}of{TIME_BUCKETS}": _finite(x) for n, x in enumerate(quarters, 1)}
        if "routing" in values:
            low, mid, high = np.asarray(values["routing"]).tolist()
            line |= dict(routing_low=low, routing_mid=mid, routing_high=high)
            line |= {k: float(values[k]) for k in ("key_rms", "value_rms")}
        line |= {k: float(values[k]) for k in ("param_norm", "update_norm")} | learning_rates(optim, step) | figures
        self._append(step, line)
        say(
            f"step {step}  loss {line['loss']:.4f}  grad {line['grad_norm']:.3g}  "
            f"{line['images_per_second']:.3g} images/s  waiting for data {line['data_wait']:.1%}{self._left(step, line)}"
        )

    def _left(self, step: int, line: dict[str, Any]) -> str:
        """How many steps there are, and how long the rest takes at the speed of the last ones, if that is known."""
        if self._steps is None:
            return ""
        seconds = round((self._steps - step) * line["step_seconds"])
        return f"  of {self._steps} steps, about {datetime.timedelta(seconds=seconds)} left"

    def add(self, step: int, figures: dict[str, float]) -> None:
        """One more line of `step` with what an evaluator returned; none if that is nothing."""
        if figures:
            self._append(step, {k: _finite(v) for k, v in figures.items()})
            say(f"step {step}  " + "  ".join(f"{name.replace('_', ' ')} {x:.4g}" for name, x in figures.items()))

    def _append(self, step: int, line: dict[str, Any]) -> None:
        if self._write:
            with disk_errors(self._workdir):
                self._file.append((json.dumps(dict(step=step) | line) + "\n").encode())
                self._board.write(step, {k: v for k, v in line.items() if v is not None})


class GrowingFile:
    """A file that starts with `content` and grows by whole records.

    Objects in a bucket cannot grow: there all of it is written anew for each record. Ten thousand lines of metrics are 5 MB, little
    beside the steps between two of them. A full disk is an `OSError` of the call, not of a thread.
    """

    def __init__(self, path: epath.Path, content: bytes = b""):
        self._path = path
        self._content = content if is_bucket(path) else None
        write_whole(path, content)
        if self._content is None:
            self._file = open(path, "ab")

    def append(self, record: bytes) -> None:
        """Adds a record; it can be read by others when this returns."""
        if self._content is not None:
            self._content += record
            self._path.write_bytes(self._content)
        else:
            self._file.write(record)
            self._file.flush()

    def close(self) -> None:
        if self._content is None:
            self._file.close()


class Board:
    """TensorBoard events in `folder`; those of step `start` and later, of before a kill, are marked as void.

    The records are framed here: TensorBoard's own writer has a thread for them, and reaches a bucket through a library of its own.
    """

    def __init__(self, folder: epath.Path, start: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = GrowingFile(folder / name)
        self._event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._event(Event(wall_time=time.time(), step=start, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Scalars of `step` by name."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._event(Event(wall_time=time.time(), step=step, summary=summary))

    def _event(self, event: Any) -> None:
        """A TFRecord: length, its checksum, data, their checksum."""
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", masked_crc32c(x)) for x in (length, data)]
        self._file.append(length + checksums[0] + data + checksums[1])

    def close(self) -> None:
        self._file.close()


def _largest(x: float) -> float:
    """The largest of what all processes give."""
    if jax.process_count() == 1:
        return x
    from jax.experimental import multihost_utils

    return float(np.max(multihost_utils.process_allgather(np.float32(x))))


def _finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _kept_lines(path: epath.Path, start: int) -> list[str]:
    """The lines of the steps up to `start`. Those that are not whole JSON are left out: the last one, which a kill may have cut,
    silently, any other is named."""
    lines = path.read_bytes().decode(errors="replace").splitlines() if path.is_file() else []
    kept, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged.append(number)
    if damaged and damaged[-1] == len(lines):
        damaged.pop()
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if damaged[1:] else ""
        say(f"{path}: line {damaged[0]}{more} cannot be read and is left out; the others are kept")
    return kept
