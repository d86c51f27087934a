"""Runs that are killed, stopped, cut short or taken up again end where a straight run ends, bit for bit."""

import json
import os
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from dynaip_jax.data.loader import make_loader
from dynaip_jax.families.tokenizers import Tokenizers
from dynaip_jax.shapeland import default
from tests.train.runs import Child, assert_same, data_state, metrics, refused, state, steps, words
from train.workdir import read_config

WORKERS = ("--data.workers", "1")  # children have a worker process too, which must not outlive them


@pytest.fixture(scope="module")
def straight(home, tmp_path_factory):
    """The folder of 12 steps without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    child = Child.train(home, folder / "log", *words(folder / "run", *WORKERS))
    assert child.end() == 0, child.log.read_text()
    assert len(child.lines()) == 12  # a line a step, and no warning
    return folder / "run"


def assert_finished_as(straight, run):
    assert_same(straight, run, 12)
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["loss"] for line in lines] == [line["loss"] for line in metrics(straight)]
    assert set(steps(run)) == set(steps(straight))


def test_killed_at_three_random_moments(home, straight, tmp_path):
    """A kill before there is a checkpoint, one while one is written over an older one, one between."""
    run, chance = tmp_path / "run", random.Random(0)

    def saving(step):
        return any((run / "checkpoints").glob(f"{step}.*tmp*/state*"))

    moments = (
        (lambda: child.says("step 1 "), chance.uniform(0, 0.03)),
        (lambda: saving(4), chance.uniform(0, 0.02)),
        (lambda: child.says("step 7 "), chance.uniform(0, 0.05)),
    )
    for number, (moment, delay) in enumerate(moments):
        child = Child.train(home, tmp_path / f"log{number}", *words(run, *WORKERS, "--resume"))
        child.wait_for(moment)
        time.sleep(delay)
        child.process.send_signal(signal.SIGKILL)
        assert child.end() == -signal.SIGKILL
        assert child.says(f"no checkpoint in {run}: starts with step 1") or number == 2
    last = Child.train(home, tmp_path / "log", *words(run, *WORKERS, "--resume"))
    assert last.end() == 0, last.log.read_text()
    assert not last.says("step 4 ")  # it did go on, not start anew
    assert_finished_as(straight, run)
    assert not any((run / "checkpoints").glob("*tmp*"))


def test_stopped_by_sigterm(home, trainer, straight, tmp_path):
    run, chance = tmp_path / "run", random.Random(1)
    child = Child.train(home, tmp_path / "log", *words(run, *WORKERS))
    child.wait_for(lambda: child.says("step 1 "))
    time.sleep(chance.uniform(0, 0.1))
    child.process.send_signal(signal.SIGTERM)
    assert child.end() == 128 + signal.SIGTERM, child.log.read_text()
    lines = child.lines()
    at = steps(run)[-1]
    assert at < 12 and lines[-1] == f"stopped by SIGTERM after step {at}; saved; go on with --resume"
    lines.remove("SIGTERM: waits for the step that runs, and its checkpoint; a second one ends the run at once")
    assert len(lines) == at + 1 and data_state(run, at)["step"] == at
    assert trainer(words(run, *WORKERS, "--resume"))[0] == 0
    assert_finished_as(straight, run)


def test_the_next_batch_is_the_one_a_straight_run_would_read(home, straight):
    data = read_config(straight).data
    bundle = default.paths()[0]
    text = json.loads((bundle / "bundle.json").read_text())["text"]
    tokenizers = Tokenizers.load(bundle / "tokenizers", text["t5_length"], text["clip_length"])
    loaders = [make_loader(data, tokenizers, global_batch=2) for _ in range(2)]
    try:
        for _ in range(13):
            expected = next(loaders[0])
        loaders[1].set_state(data_state(straight, 12))
        jax.tree.map(np.testing.assert_array_equal, next(loaders[1]), expected)
    finally:
        for loader in loaders:
            loader.close()


def test_more_steps_on_resume(trainer, straight, tmp_path):
    """6, then 12, are 12; without a word there is nothing left to do."""
    run = tmp_path / "run"
    assert trainer(words(run, "--steps", 6))[0] == 0
    assert trainer(words(run, "--resume", "--data.workers", 1))[0] == 0
    assert_finished_as(straight, run)
    before = state(run, 12)
    assert trainer(words(run, "--resume")) == (0, ["step 12 of 12 is done already; raise --steps to go on"])
    assert all(np.array_equal(before[name], x) for name, x in state(run, 12).items())
    assert [line["step"] for line in metrics(run)] == list(range(1, 13))


def test_a_half_written_checkpoint_is_not_taken(trainer, straight, tmp_path):
    """As a crash in mid-save leaves it: the temporary folder of a save, and a last line cut short."""
    run = tmp_path / "run"
    assert trainer(words(run, "--steps", 4))[0] == 0
    half = run / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "4", half)
    (half / "commit_success.txt").unlink()
    for path in half.glob("state/**/d/*"):
        path.write_bytes(path.read_bytes()[:1000])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 2.5}\n{"step": 6, "lo')
    assert trainer(words(run, "--resume"))[0] == 0
    assert_finished_as(straight, run)
    assert not half.exists()


def test_best_and_last_are_kept(trainer, tmp_path):
    """A seed with which the loss rises: the best checkpoint is an early one. It is chosen over a resumption alike."""
    rising = ("--data.seed", 4, "--keep", 2)
    assert trainer(words(tmp_path / "run", *rising))[0] == 0
    running, means = None, {}
    for line in metrics(tmp_path / "run"):
        running = line["loss"] if running is None else 0.9 * running + 0.1 * line["loss"]
        means[line["step"]] = running
    best = min(range(2, 13, 2), key=means.get)
    assert best < 10 and steps(tmp_path / "run") == [best, 10, 12]
    for number in (4, 8, 12):
        assert trainer(words(tmp_path / "again", *rising, "--steps", number, "--resume"))[0] == 0
    assert steps(tmp_path / "again") == [best, 10, 12]
    assert_same(tmp_path / "run", tmp_path / "again", best)


def test_a_fixed_batch_stays_the_same_over_a_resumption(trainer, tmp_path):
    """Base and adapter trained."""
    fixed = ("--fixed-batch", "--trainable", "all")
    assert trainer(words(tmp_path / "run", *fixed, "--steps", 4))[0] == 0
    for number in (2, 4):
        assert trainer(words(tmp_path / "again", *fixed, "--steps", number, "--resume"))[0] == 0
    assert_same(tmp_path / "run", tmp_path / "again", 4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_before_there_is_anything_to_save(home, tmp_path, number):
    """While it loads, at once; the whole group is told, as by Ctrl-C, and the worker says nothing of its own."""
    child = Child.train(home, tmp_path / "log", *words(tmp_path / "run", *WORKERS), process_group=0)
    child.wait_for((tmp_path / "run").is_dir)
    os.killpg(child.process.pid, number)
    began = time.monotonic()
    assert child.end() == 128 + number and time.monotonic() - began < 30
    lines = child.lines()
    assert lines[-1].startswith(
        (f"stopped by {number.name}; there was nothing new", f"ended by {number.name} after")
    ), lines
    assert len(lines) <= 2 and not (tmp_path / "run" / "checkpoints" / "2").exists()


def test_two_signals_end_it_at_once(home, trainer, straight, tmp_path):
    """What was saved before stays, and the lock of the dead holds nobody up."""
    run = tmp_path / "run"
    child = Child.train(home, tmp_path / "log", *words(run, *WORKERS, "--steps", 100_000))
    child.wait_for(lambda: child.says("step 4 "))
    child.process.send_signal(signal.SIGTERM)
    child.wait_for(lambda: child.says("SIGTERM: waits"))
    child.process.send_signal(signal.SIGTERM)
    assert child.end() == 128 + signal.SIGTERM
    shutil.rmtree(run / "samples", ignore_errors=True)
    assert trainer(words(run, *WORKERS, "--resume", "--steps", 12))[0] == 0


def test_a_second_trainer_is_refused(home, trainer, tmp_path):
    run = tmp_path / "run"
    child = Child.train(home, tmp_path / "log", *words(run, "--steps", 100_000, "--save-every", 100_000))
    child.wait_for(lambda: child.says("step 1 "))
    for how in ("--resume", "--overwrite"):
        refused(trainer, words(run, how), f"--workdir {run}: process {child.process.pid} on ", "trains in it; wait")
    child.process.send_signal(signal.SIGKILL)
    child.end()
    assert (run / "trainer.lock").is_file()
    assert trainer(words(run, "--resume", "--steps", 2))[0] == 0
    assert steps(run) == [2] and not (run / "trainer.lock").exists()
