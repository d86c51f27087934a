"""Batches ahead of time: order, processes, workers, resuming."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from dynaip_jax.data import samples
from dynaip_jax.data.asking import Answers
from dynaip_jax.data.config import buckets
from dynaip_jax.data.loader import BatchIterator, _Steps, make_loader
from dynaip_jax.data.order import BatchOrder, make_order
from dynaip_jax.data.records import INDEX, open_dataset, write_dataset
from dynaip_jax.errors import UserError
from tests.data.photos import WordIds, config, entries, make_dataset, same, take

# --- order, processes, workers


def test_processes_share_out_the_same_global_batches(folder):
    whole = take(make_loader(config(folder), WordIds(), global_batch=8), 7)
    for count in (2, 4):
        loaders = [
            make_loader(config(folder), WordIds(), global_batch=8, positions=positions)
            for positions in np.arange(8).reshape(count, -1)
        ]
        parts = [take(loader, 7) for loader in loaders]
        for step, batch in enumerate(whole):
            assert len({part[step].target.shape for part in parts}) == 1
            joined = jax.tree.map(lambda *xs: np.concatenate(xs), *(part[step] for part in parts))
            assert same([joined], [batch])
    steps = make_loader(config(folder), WordIds(), global_batch=8).order.steps_per_epoch
    rows = np.concatenate([b.row for b in whole[:steps]])
    assert len(set(rows)) == len(rows) == 40


def test_worker_processes_give_what_threads_give(folder):
    expected = take(make_loader(config(folder), WordIds(), global_batch=4), 13)
    for workers in (1, 2):
        loader = make_loader(config(folder, workers=workers), WordIds(), global_batch=4)
        try:
            first = take(loader, 9)
            state = loader.get_state()
            rest = take(loader, 4)
            assert same(first + rest, expected)
            assert isinstance(first[0], samples.Batch)
            if workers == 1:
                loader.set_state(state)
                assert same(take(loader, 4), rest)
        finally:
            loader.close()


def test_workers_ask_for_their_rows_and_hold_no_order():
    """What is sent to a worker does not grow with the rows; what it is told is the order."""
    sizes = np.random.default_rng(0).integers(64, 2000, (200_000, 2))
    order, positions = BatchOrder(sizes, buckets(512, ("1:1", "3:2", "2:3")), 64, 5), np.array([3, 4, 60])
    answers = Answers(order, positions)
    try:
        sent = pickle.dumps(_Steps(answers.asked, None, 0))
        assert len(sent) < 2000
        asked = [pickle.loads(sent).asked for _ in range(2)]
        for step in (0, 7, order.steps_per_epoch - 1, order.steps_per_epoch, 3 * order.steps_per_epoch + 1):
            whole = order.step(step)
            for one in asked:
                told = one.step(step)
                assert (told.epoch, told.bucket) == (whole.epoch, whole.bucket)
                np.testing.assert_array_equal(told.rows, whole.rows[positions])
    finally:
        answers.close()
    with pytest.raises((EOFError, OSError)):
        pickle.loads(sent).asked.step(0)


def test_resume_within_and_across_epochs(folder):
    def loader():
        return make_loader(config(folder), WordIds(), global_batch=4)

    straight = loader()
    assert straight.order.steps_per_epoch == 10
    states, batches = [], []
    for _ in range(25):
        states.append(straight.get_state())
        batches += take(straight, 1)
    for step in (0, 4, 8, 9, 10, 19, 22):
        resumed = loader()
        take(resumed, 2)
        resumed.set_state(states[step])
        assert resumed.get_state() == states[step]
        assert same(take(resumed, 3), batches[step : step + 3])
    again = [b for b, c in zip(batches[:10], batches[10:20], strict=True) if np.array_equal(b.row, c.row)]
    assert len(again) < 3  # another order in the second epoch


def test_a_state_of_other_data_is_refused(folder, tmp_path):
    state = make_loader(config(folder), WordIds(), global_batch=4).get_state()
    other = make_dataset(tmp_path, times=10)
    for loader in (
        make_loader(config(other), WordIds(), global_batch=4),
        make_loader(config(folder), WordIds(), global_batch=2),
        make_loader(config(folder, seed=8), WordIds(), global_batch=4),
        make_loader(config(folder, resolution=96), WordIds(), global_batch=4),
    ):
        with pytest.raises(UserError, match="the checkpoint was made with other"):
            loader.set_state(state)
    moved = make_loader(config(folder, drop_image=0.5), WordIds(), global_batch=4, positions=np.arange(2, 4))
    moved.set_state(state | dict(step=5))
    assert moved.get_state()["step"] == 5


def test_a_state_of_other_pictures_is_refused(folder, tmp_path):
    """Of the same sizes; a state of before there were digests goes on."""
    state = make_loader(config(folder), WordIds(), global_batch=4).get_state()
    rows = [open_dataset(folder)[n] for n in range(44)]
    for name, caption in (("other", "another caption"), ("copy", rows[7].caption)):
        (tmp_path / name).mkdir()
        write_dataset(tmp_path / name, [*rows[:7], rows[7]._replace(caption=caption), *rows[8:]])
    make_loader(config(tmp_path / "copy"), WordIds(), global_batch=4).set_state(state)
    other = make_loader(config(tmp_path / "other"), WordIds(), global_batch=4)
    assert other.order.fingerprint == state["plan"]
    with pytest.raises(UserError, match="data: the checkpoint was made with other pictures or captions .content"):
        other.set_state(state)
    other.set_state(dict(step=3, plan=state["plan"]))
    assert other.get_state()["step"] == 3


def test_orbax_saves_and_restores_the_iterator(folder, tmp_path):
    import grain
    import orbax.checkpoint as ocp

    loader = make_loader(config(folder), WordIds(), global_batch=4)
    take(loader, 13)
    with ocp.CheckpointManager(tmp_path.absolute()) as manager:
        manager.save(13, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(loader)))
        manager.wait_until_finished()
        expected = take(loader, 2)
        fresh = make_loader(config(folder), WordIds(), global_batch=4)
        manager.restore(13, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    assert same(take(fresh, 2), expected)


class Precomputed:
    """A reader of features; what `Reader` asks for and no more."""

    def read(self, rows, bucket, epoch):
        return samples.Draw(rows * 10, np.full(len(rows), bucket.width), np.full(len(rows), epoch), 0, (rows, rows + 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_any_reader_is_fed_in_the_same_order(folder, workers):
    order = make_order(config(folder), open_dataset(folder), 4)
    features = BatchIterator(order, Precomputed(), positions=np.arange(4), workers=workers, prefetch=1)
    batches = take(features, 12)
    features.close()
    for batch, (rows, widths, epochs, _, pair) in zip(
        take(make_loader(config(folder), WordIds(), global_batch=4), 12), batches, strict=True
    ):
        np.testing.assert_array_equal(rows, batch.row * 10)
        assert isinstance(pair, tuple)
        np.testing.assert_array_equal(pair, (batch.row, batch.row + 1))
        assert set(widths) == {batch.target.shape[2]} and len(set(epochs)) == 1
    assert [b[2][0] for b in batches] == [0] * 10 + [1] * 2


@pytest.mark.parametrize("ending", ["runs out", "is killed"])
def test_workers_end_with_the_trainer_and_not_before(folder, ending):
    """A script that never closes its loader, and one killed with -9 after a SIGTERM to its whole process group."""
    code = f"""
import signal, sys, time
from tests.data.photos import config, WordIds
from dynaip_jax.data.loader import make_loader
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)
    loader = make_loader(config({str(folder)!r}, workers=1), WordIds(), global_batch=4)
    batch = next(loader)
    print("fed", flush=True)
    if {ending == "is killed"}:
        sys.stdin.readline()
        for _ in range(9):
            next(loader)
        print("still fed", flush=True)
        time.sleep(60)
"""
    script = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert script.stdout.readline() == "fed\n"
    if ending == "is killed":
        os.killpg(script.pid, signal.SIGTERM)
        script.stdin.write("\n")
        script.stdin.flush()
        assert script.stdout.readline() == "still fed\n"
        script.kill()
    try:
        complaints = script.communicate(timeout=15)[1]  # ends when the last process that holds the output has ended
        assert script.returncode == (0 if ending == "runs out" else -signal.SIGKILL)
        assert ending == "is killed" or complaints == ""
    finally:
        if script.poll() is None:
            script.kill()


def test_a_killed_worker_is_told(folder):
    loader = make_loader(config(folder, workers=1), WordIds(), global_batch=4)
    next(loader)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(UserError, match="`data.workers` 1: .* exit code -9; .*--shm-size"):
        take(loader, 20)
    loader.close()


# --- errors


def test_bad_loaders(folder):
    for changes, batch, message in (
        (dict(path=""), 4, "`data.path`: not given"),
        (dict(path=str(folder / "missing")), 4, "missing: no dataset_info.json"),
        ({}, 45, "44 rows for a global batch of 45"),
        (dict(remove_background=True), 4, "33 of 44 rows of .* have no mask .row 1 is"),
    ):
        with pytest.raises(UserError, match=message):
            make_loader(config(folder, **changes), WordIds(), global_batch=batch)


def test_a_poor_bucket_is_warned_of(folder):
    with pytest.warns(UserWarning, match="bucket 1:1: 11 rows do not fill a batch of 12"):
        loader = make_loader(config(folder), WordIds(), global_batch=12)
    assert loader.order.steps_per_epoch == 3


@pytest.mark.filterwarnings("ignore:.*do not fill a batch")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_dataset_is_named_from_wherever_it_is_read(tmp_path, workers):
    path = make_dataset(tmp_path, times=2)
    loader = make_loader(config(path, workers=workers), WordIds(), global_batch=4)
    shard = next(path.glob("*array_record*"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match=f"dataset {path}: row . is damaged"):
        take(loader, 1)
    loader.close()


def test_the_index_alone_makes_the_order(tmp_path):
    path = make_dataset(tmp_path, times=2)
    with np.load(path / INDEX) as index:
        np.testing.assert_array_equal(index["sizes"][:4], [(512, 512), (300, 451), (400, 600), (427, 640)])
    first = entries(tmp_path)[0]
    assert open_dataset(path)[0].subject == first["subject"]
