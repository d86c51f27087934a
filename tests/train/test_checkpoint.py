"""Damaged checkpoints are named, with an older one to go on from."""

import contextlib
import json
import re
import shutil

import jax
import numpy as np
import pytest

from dynaip_jax.errors import UserError
from tests.train.runs import metrics, refused, steps, words
from train import export
from train.checkpoint import Checkpoints
from train.checksums import CHECKSUMS, damage
from train.config import OptimConfig
from train.state import init_state


class Position:
    """The data of a run that has done `step` steps."""

    def __init__(self, step=0):
        self.step = step

    def get_state(self):
        return dict(step=self.step, plan="p")

    def set_state(self, state):
        self.step = state["step"]


def small_state(step):
    params = dict(adapter=dict(kernel=np.full((40, 50), step, np.float32), scale=np.ones(3, np.float32)))
    return init_state(OptimConfig(), jax.tree.map(jax.numpy.asarray, params))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with checkpoints 2, 4 and 6 of a small state."""
    run = tmp_path_factory.mktemp("three") / "run"
    with contextlib.closing(Checkpoints(run, keep=3)) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(step, small_state(step), Position(step), 1.0 / step)
    return run


@pytest.fixture
def run(three, tmp_path):
    """A copy of it."""
    return shutil.copytree(three, tmp_path / "run")


def restored(run, step, **options):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), small_state(0))
    with contextlib.closing(Checkpoints(run, keep=3, **options)) as checkpoints:
        assert checkpoints.mean_loss(step) == 1 / step and (not options or checkpoints.latest() == 6)
        position = Position()
        state = checkpoints.restore(step, target, position)
        return float(state.params["adapter"]["kernel"][0, 0]), position.step


def largest(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES = {
    "truncated": (lambda kept: largest(kept / "state").write_bytes(b"short"), r"state/\S+ is damaged"),
    "one bit": (lambda kept: flip(largest(kept / "state")), r"state/\S+ is damaged"),
    "a file gone": (lambda kept: largest(kept / "state").unlink(), r"state/\S+ is missing"),
    "data gone": (lambda kept: shutil.rmtree(kept / "data"), "data/metadata is missing"),
    "metadata gone": (lambda kept: (kept / "_CHECKPOINT_METADATA").unlink(), "_CHECKPOINT_METADATA is missing"),
    "tree gone": (lambda kept: (kept / "state" / "_METADATA").unlink(), "state/_METADATA is missing"),
    "checksums": (lambda kept: (kept / CHECKSUMS).write_text("{"), f"{CHECKSUMS} cannot be read"),
    "figures": (lambda kept: (kept / "metrics" / "metrics").write_text("[" * 9999), "metrics/metrics cannot be read"),
    "figures gone": (lambda kept: shutil.rmtree(kept / "metrics"), "metrics/metrics is missing"),
    "emptied": (lambda kept: [f.write_bytes(b"") for f in kept.rglob("*") if f.is_file()], "is damaged|cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_newest_is_damaged(run, name):
    do, found = DAMAGES[name]
    do(run / "checkpoints" / "6")
    with pytest.raises(UserError) as e:
        restored(run, 6)
    message = str(e.value)
    assert re.search(found, message) and len(message) < 300, message
    assert message.startswith(f"{run}/checkpoints/6: ")
    assert message.endswith("expected a whole checkpoint; go on from an older one with `resume_from` 4")
    assert steps(run) == [2, 4, 6]
    assert restored(run, 4, reading=True) == (4, 4)


@pytest.mark.parametrize("item", ["state", "data", "metrics"])
def test_a_run_of_an_older_version_has_no_checksums(run, item):
    """What is damaged there is named as far as it is noticed."""
    kept = run / "checkpoints" / "6"
    (kept / CHECKSUMS).unlink()
    assert damage(kept) is None and restored(run, 6) == (6, 6)
    shutil.rmtree(kept / item)
    with pytest.raises(UserError, match=f"{run}/checkpoints/6: .* with `resume_from` 4"):
        restored(run, 6)


def test_the_only_one_is_damaged(run):
    for step in (2, 4):
        shutil.rmtree(run / "checkpoints" / str(step))
    flip(largest(run / "checkpoints" / "6" / "state"))
    with pytest.raises(UserError, match="there is no older one: start anew with `overwrite`, or in another `workdir`"):
        restored(run, 6)


def test_an_older_one_is_damaged(run):
    shutil.rmtree(run / "checkpoints" / "2" / "metrics")
    with pytest.raises(
        UserError, match="checkpoints/2: metrics/metrics is missing; .* move this folder away to go on from 6"
    ):
        restored(run, 6)


def test_reading_changes_nothing(run):
    """Not even what looks like litter, which is a save in progress; nor is a folder made."""
    half = run / "checkpoints" / "8.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "6", half)
    assert restored(run, 6, reading=True) == (6, 6) and half.is_dir()
    flip(largest(run / "checkpoints" / "6" / "state"))
    with pytest.raises(UserError, match="is damaged; expected a whole checkpoint; pass `step` 4"):
        restored(run, 6, reading=True)
    assert restored(run, 4)[0] == 4 and not half.exists()  # a trainer, alone there, removes it
    shutil.rmtree(run / "checkpoints")
    with contextlib.closing(Checkpoints(run, reading=True)) as checkpoints:
        assert checkpoints.steps() == [] and checkpoints.latest() is None and checkpoints.best() is None
    assert not (run / "checkpoints").exists()


def test_a_checkpoint_is_summed_up_before_it_has_its_name(three):
    for step in (2, 4, 6):
        kept = three / "checkpoints" / str(step)
        sums = json.loads((kept / CHECKSUMS).read_text())
        files = {file.relative_to(kept).as_posix() for file in kept.rglob("*") if file.is_file()}
        assert {name for name in files - set(sums) if not name.endswith("commit_success.txt")} == {CHECKSUMS}
        assert {name.partition("/")[0] for name in sums} >= {"state", "data", "metrics", "_CHECKPOINT_METADATA"}


def test_a_kill_while_one_is_deleted_leaves_no_half_checkpoint(run, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(Checkpoints, "_discard", lambda self: None)
        with contextlib.closing(Checkpoints(run, keep=1)) as checkpoints:
            checkpoints.save(8, small_state(8), Position(8), 1.0)
    assert steps(run) == [6, 8]  # the best and the latest
    old = run / "checkpoints" / "discarded"
    assert sorted(path.name for path in old.iterdir()) == ["2", "4"] and damage(old / "2") is None
    (old / "2" / "metrics" / "metrics").unlink()
    assert restored(run, 6) == (6, 6) and not old.exists()


def test_a_run_goes_on_from_an_older_one(trainer, tmp_path):
    run, small = tmp_path / "run", ("--keep", 3)
    assert trainer(words(run, *small, "--steps", 6))[0] == 0
    whole = metrics(run)
    flip(largest(run / "checkpoints" / "6" / "state"))
    refused(
        trainer, words(run, "--resume"), f"{run}/checkpoints/6: state/", "go on from an older one with --resume-from 4"
    )
    refused(trainer, words(run, "--resume-from", 5), "--resume-from 5: no such checkpoint", "it has 2, 4, 6")
    refused(trainer, words(run, "--resume-from", 4, "--overwrite"), "--resume-from and --overwrite: they exclude")
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[2], lines[3] = '{"step": 3, "lo', '"\udce9"'
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    status, said = trainer(words(run, *small, "--resume-from", 4, "--steps", 6))
    assert status == 0
    assert f"checkpoints after step 4 (6) are set aside in {run}/set_aside/1" in said
    assert f"{file}: line 3 (and 1 more) cannot be read and is left out; the others are kept" in said
    assert steps(run) == [2, 4, 6] and (run / "set_aside" / "1" / "6").is_dir()
    assert [line["step"] for line in metrics(run)] == [1, 2, 5, 6]
    assert [line["loss"] for line in metrics(run)[2:]] == [line["loss"] for line in whole[4:]]
    shutil.rmtree(run / "checkpoints")
    refused(trainer, ["--workdir", run, "--out", tmp_path / "x"], "--step last: no such", "none", command=export.main)
