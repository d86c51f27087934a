"""Checkpoints in a bucket, which Orbax and tensorstore write and read: whole, known again, and gone in one step."""

import contextlib
import sys

import jax
import pytest
from etils import epath

from dynaip_jax.errors import UserError
from tests.fake_bucket import FakeBucket
from tests.train.test_checkpoint import Position, small_state
from train.assemble import check_imports
from train.checkpoint import Checkpoints
from train.checksums import CHECKSUMS, COMMITTED
from train.workdir import steps_in

LOSSES = {2: 0.1, 4: 0.4, 6: 0.3, 8: 0.2}


def save(run, *steps, keep=1):
    with contextlib.closing(Checkpoints(run, keep=keep)) as checkpoints:
        for step in steps:
            checkpoints.save(step, small_state(step), Position(step), LOSSES[step])
        checkpoints.wait()


def restored(run, step):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), small_state(0))
    position = Position()
    with contextlib.closing(Checkpoints(run, reading=True)) as checkpoints:
        state = checkpoints.restore(step, target, position)
    return float(state.params["adapter"]["kernel"][0, 0]), position.step


def files_of(run, step):
    return [name for name in FakeBucket.store if name.startswith(f"/bucket/{run.name}/checkpoints/{step}/")]


@pytest.fixture
def run(served_bucket):
    return epath.Path(served_bucket) / "run"


def test_the_latest_and_the_best_are_kept_and_others_stop_being_any_first(run):
    save(run, 2, 4, 6, 8)
    assert steps_in(run) == [2, 8] and restored(run, 8) == (8, 8) and restored(run, 2) == (2, 2)
    for step in (4, 6):
        assert not files_of(run, step)
        removed = [n for n in FakeBucket.removed if n.startswith(f"/bucket/run/checkpoints/{step}/")]
        assert removed[0].endswith(f"/{step}/{COMMITTED}") and len(removed) > 4
    written = [n for n in FakeBucket.written if n.startswith("/bucket/run/checkpoints/8/")]
    assert written.index(f"/bucket/run/checkpoints/8/{CHECKSUMS}") < written.index(
        f"/bucket/run/checkpoints/8/{COMMITTED}"
    )


def test_what_a_kill_left_is_no_checkpoint_and_is_written_anew(run):
    save(run, 2, 4, keep=2)
    (run / "checkpoints" / "4" / COMMITTED).unlink()
    assert steps_in(run) == [2]
    with contextlib.closing(Checkpoints(run, keep=2)) as checkpoints:
        assert checkpoints.latest() == 2
        checkpoints.save(4, small_state(4), Position(4), LOSSES[4])
        checkpoints.wait()
    assert steps_in(run) == [2, 4] and restored(run, 4) == (4, 4)


def test_damage_is_named(run):
    save(run, 2, 4, keep=2)
    name = max(files_of(run, 4), key=lambda n: len(FakeBucket.store[n].getvalue()))
    data = bytearray(FakeBucket.store[name].getvalue())
    data[len(data) // 2] ^= 1
    FakeBucket().pipe_file(name, bytes(data))
    with pytest.raises(UserError, match=r"gs://bucket/run/checkpoints/4: state/.* is damaged; .* pass `step` 2"):
        restored(run, 4)
    FakeBucket().rm_file(name)
    with pytest.raises(UserError, match=r"checkpoints/4: state/.* is missing"):
        restored(run, 4)


def test_the_client_that_orbax_needs_is_asked_for_before_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(UserError, match="`workdir` gs://b/run: .* need google-cloud-storage, which is not installed"):
        check_imports("gs://b/run")
    check_imports("runs/mine")
