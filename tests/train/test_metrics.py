"""What a run writes of itself: metrics.jsonl and TensorBoard events, on a disk and in a bucket."""

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from tests.train.runs import losses
from train.checksums import damage
from train.config import OptimConfig, SampleConfig
from train.loop import train
from train.metrics import METRICS_FILE, GrowingFile, Meter, Metrics
from train.optim import learning_rates
from train.workdir import steps_in

VALUES = dict(
    loss=np.float32(2), grad_norm=np.float32(3), param_norm=np.float32(5), update_norm=np.float32(0.5),
    loss_by_time=np.array([1, np.nan, 3, 4], np.float32),
)  # fmt: skip
FIGURES = dict(images_per_second=1.0, data_wait=0.0, mfu=None)


def events(folder):
    """The events of every file in `folder`, as TensorBoard reads them: checksums checked."""
    for path in sorted(folder.iterdir()):
        with tempfile.TemporaryDirectory() as copies:
            copy = Path(copies, path.name)
            copy.write_bytes(path.read_bytes())
            yield from LegacyEventFileLoader(str(copy)).Load()


def write_two(workdir, start=0):
    with Metrics(workdir, start, write=True) as metrics:
        metrics.write(start + 1, VALUES, FIGURES, OptimConfig())
        metrics.add(start + 1, dict(validation_loss=0.25))
        metrics.add(start + 2, {})


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_lines_and_events(tmp_path, bucket, place):
    workdir = epath.Path(bucket if place == "bucket" else tmp_path) / "run"
    workdir.mkdir(parents=True)
    write_two(workdir)
    file = workdir / METRICS_FILE
    file.write_text(file.read_text() + '{"step": 2, "loss": 1}\n{"step": 3, "lo')
    write_two(workdir, start=1)  # drops what came after step 1
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 2, 2]
    assert lines[1] == dict(step=1, validation_loss=0.25)
    expected = dict(step=2, loss=2, grad_norm=3, param_norm=5, update_norm=0.5, loss_t2of4=None, loss_t3of4=3, mfu=None)
    assert lines[2].items() >= (expected | learning_rates(OptimConfig(), 2)).items()
    read = list(events(workdir / "tensorboard"))
    assert sum(event.file_version == "brain.Event:2" for event in read) == 2
    assert [event.step for event in read if event.HasField("session_log")] == [1, 2]
    scalars = {v.tag: v.simple_value for event in read for v in event.summary.value if event.step == 2}
    assert scalars.items() >= dict(loss=2, param_norm=5, validation_loss=0.25).items() and "mfu" not in scalars


def test_a_file_that_grows_is_whole_after_each_record(bucket, tmp_path):
    for path in (epath.Path(bucket) / "file", epath.Path(tmp_path) / "file"):
        file = GrowingFile(path, b"a\n")
        for n in range(3):
            file.append(b"b\n")
            assert path.read_bytes() == b"a\n" + b"b\n" * (n + 1)
        file.close()
        assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_the_longest_wait_for_data_is_told(monkeypatch):
    """Of all processes: one that waits makes the others wait in the next step, where nobody sees what for."""
    device = SimpleNamespace(device_kind="cpu")
    run = SimpleNamespace(
        mesh=SimpleNamespace(devices=np.array([device])), config=SimpleNamespace(batch=2), flops=lambda tokens: 1,
        constants=SimpleNamespace(family=SimpleNamespace(tokens=lambda shape: 1)),
    )  # fmt: skip
    meter, given = Meter(run), []

    def of_all(x):
        given.append(float(x))
        return np.array([x, 0.75])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", of_all)
    meter.count((2, 1, 1, 1))
    time.sleep(0.01)
    assert meter.read()["data_wait"] == 0.75 and given == [0.0]
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    meter.count((2, 1, 1, 1))
    assert meter.read()["data_wait"] == 0.0 and len(given) == 1


def test_a_run_in_a_bucket(config, served_bucket):
    sample = SampleConfig(every=2, rows=1, size=32, steps=1)
    run = dataclasses.replace(config, batch=2, sample=sample, save_every=2)
    workdir = epath.Path(served_bucket) / "run"
    train(dataclasses.replace(run, steps=2), workdir)
    train(dataclasses.replace(run, steps=4), workdir, resume=True)
    assert steps_in(workdir) == [2, 4] and all(damage(workdir / "checkpoints" / step) is None for step in "24")
    assert len(losses(workdir)) == 4
    assert sorted(p.name for p in (workdir / "samples").iterdir()) == ["step_000002.png", "step_000004.png"]
    assert (workdir / "run.json").is_file() and len(list((workdir / "tensorboard").iterdir())) == 2
