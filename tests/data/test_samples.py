"""Training batches: decoding, augmentation, drops, order, workers, resuming."""

import dataclasses
import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from dynaip_jax import images
from dynaip_jax.data import samples as sources
from dynaip_jax.data.order import Bucket
from dynaip_jax.data.records import INDEX, open_dataset
from dynaip_jax.data.samples import DataConfig, make_loader
from dynaip_jax.errors import UserError
from tests.data.photos import CAPTIONS, WordIds, entries, make_dataset

PLAIN = dict(crop_reference=1.0, flip_reference=0.0, drop_image=0.0, drop_text=0.0, drop_both=0.0)
SQUARE = Bucket("1:1", 64, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """44 rows: 4 photographs, 11 times."""
    return make_dataset(tmp_path_factory.mktemp("photos"), times=11)


def config(folder, **changes):
    given_ = dict(path=str(folder), resolution=64, aspects=("1:1", "3:2"), clip_size=32, workers=0, seed=7)
    return DataConfig(**given_ | changes)


def take(loader, count):
    return list(itertools.islice(loader, count))


def same(a, b):
    return len(a) == len(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for u, v in zip(a, b, strict=True)
        for x, y in zip(u, v, strict=True)
    )


# --- one batch


def test_shapes_types_and_ranges(folder):
    loader = make_loader(config(folder), WordIds(), global_batch=4)
    seen = set()
    for batch in take(loader, 11):
        seen.add(batch.target.shape)
        assert batch.reference.shape == (4, 1, 32, 32, 3)
        assert batch.t5_ids.shape == (4, 8) and batch.clip_ids.shape == (4, 77)
        assert batch.keep_image.shape == batch.row.shape == (4,)
        assert [x.dtype for x in batch] == [np.float32] * 2 + [np.int32] * 2 + [np.float32, np.int32]
        assert batch.target.min() >= -1 and batch.target.max() <= 1 and batch.target.std() > 0.2
    assert seen == {(4, 64, 64, 3), (4, 48, 80, 3)}


def test_pixels_against_pil(folder):
    dataset = open_dataset(folder)
    bucket = Bucket("3:2", 48, 80)
    batch = sources.Pictures(dataset, config(folder, **PLAIN), WordIds()).read(np.array([1, 2]), bucket, 0)
    for target, photo in zip(batch.target, (data.chelsea(), data.coffee()), strict=True):
        h, w = photo.shape[:2]
        wide, high = (w, w * 48 / 80) if w / h < 80 / 48 else (h * 80 / 48, h)
        left, top = (w - wide) / 2, (h - high) / 2
        resized = Image.fromarray(photo).resize((80, 48), Image.LANCZOS, (left, top, left + wide, top + high))
        np.testing.assert_allclose(target, np.asarray(resized) / 127.5 - 1, atol=1e-6)
    for reference, photo in zip(batch.reference, (data.chelsea(), data.rocket()), strict=True):
        np.testing.assert_array_equal(reference[0], images.clip_pixels(photo, 32))
    np.testing.assert_array_equal(batch.t5_ids, WordIds().t5([CAPTIONS[n][0] for n in ("chelsea", "coffee")]))
    np.testing.assert_array_equal(batch.clip_ids, WordIds().clip([CAPTIONS[n][0] for n in ("chelsea", "coffee")]))
    np.testing.assert_array_equal(batch.row, [1, 2])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (80, 48), (512, 512), (1024, 1024)])
def test_cover_keeps_the_centre_and_the_shape(height, width):
    photo = np.zeros((301, 451, 3), np.uint8)
    photo[150, :], photo[:, 225] = 255, 255  # a cross through the centre
    covered = sources.cover(photo, height, width)
    assert covered.shape == (height, width, 3)
    np.testing.assert_allclose(covered, covered[::-1, ::-1], atol=0.02)
    plain = sources.cover(np.full((301, 451, 3), 51, np.uint8), height, width)
    np.testing.assert_allclose(plain, 51 / 127.5 - 1, atol=1e-6)


def test_reference_may_be_cropped_square(folder):
    pictures = sources.Pictures(open_dataset(folder), config(folder, **PLAIN, square="crop"), WordIds())
    reference = pictures.read(np.array([1]), SQUARE, 0).reference
    np.testing.assert_array_equal(reference[0, 0], images.clip_pixels(data.chelsea(), 32, "crop"))


def test_background_is_removed_by_the_mask(tmp_path):
    dataset = open_dataset(make_dataset(tmp_path))
    target, reference = sources.pictures(dataset[1], "cat", remove_background=True)
    np.testing.assert_array_equal(target, data.chelsea())
    inside = np.zeros((300, 451), bool)
    inside[50:250, 100:350] = True
    np.testing.assert_array_equal(reference[inside], data.chelsea()[inside])
    assert (reference[~inside] == images.NEUTRAL).all()
    np.testing.assert_array_equal(sources.pictures(dataset[1], "cat", remove_background=False)[1], data.chelsea())
    with pytest.raises(UserError, match="astronaut: no mask"):
        sources.pictures(dataset[0], "astronaut", remove_background=True)


def test_a_half_covered_pixel_is_half_background(tmp_path):
    record = open_dataset(make_dataset(tmp_path))[1]
    grey = io.BytesIO()
    Image.fromarray(np.full((300, 451), 128, np.uint8)).save(grey, "PNG")
    reference = sources.pictures(record._replace(mask=grey.getvalue()), "cat", remove_background=True)[1]
    expected = (data.chelsea() * 128.0 + np.array(images.NEUTRAL) * 127.0) / 255
    assert np.abs(reference - expected).max() <= 0.51


def test_boxes_cut_both_pictures(tmp_path):
    record = open_dataset(make_dataset(tmp_path))[0]
    record = record._replace(target_box=np.array([0, 0, 100, 200]), reference_box=np.array([50, 60, 150, 260]))
    target, reference = sources.pictures(record, "astronaut", remove_background=False)
    np.testing.assert_array_equal(target, data.astronaut()[:100, :200])
    np.testing.assert_array_equal(reference, data.astronaut()[50:150, 60:260])


# --- augmentation and drops


def test_flips(folder):
    dataset = open_dataset(folder)

    def read(**changes):
        return sources.Pictures(dataset, config(folder, **PLAIN | changes), WordIds()).read(np.array([1]), SQUARE, 0)

    plain, reference, target = read(), read(flip_reference=1.0), read(flip_target=1.0)
    np.testing.assert_array_equal(reference.reference, plain.reference[:, :, :, ::-1])
    assert np.abs(reference.reference - plain.reference).max() > 0.5
    np.testing.assert_array_equal(reference.target, plain.target)
    np.testing.assert_array_equal(target.target, plain.target[:, :, ::-1])
    np.testing.assert_array_equal(target.reference, plain.reference)


@given(st.integers(8, 500), st.integers(8, 500), st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1))
def test_crop(height, width, area, down, along):
    place = np.stack(np.mgrid[:height, :width], axis=-1)
    part = sources.crop(place, area, down, along)
    h, w = part.shape[:2]
    assert abs(h - height * area**0.5) <= 1 and abs(w - width * area**0.5) <= 1
    np.testing.assert_array_equal(part[-1, -1] - part[0, 0], (h - 1, w - 1))
    assert abs(part[0, 0, 0] - (height - h) * down) <= 0.5 and abs(part[0, 0, 1] - (width - w) * along) <= 0.5


def test_crops_keep_at_least_the_share_asked_for():
    areas = [sources.draw(DataConfig(crop_reference=0.3), 0, row).crop[0] for row in range(2000)]
    assert 0.3 <= min(areas) < 0.31 and 0.99 < max(areas) <= 1
    assert sources.draw(DataConfig(crop_reference=1.0), 0, 0).crop[0] == 1


def test_drop_rates():
    chances = DataConfig(drop_image=0.1, drop_text=0.2, drop_both=0.05, flip_reference=0.3, flip_target=0.4)
    draws = [sources.draw(chances, epoch, row) for epoch in range(4) for row in range(5000)]
    n = len(draws)

    def rate(test):
        return sum(map(test, draws)) / n

    for found, expected in (
        (rate(lambda d: d.drop_image and not d.drop_text), 0.1),
        (rate(lambda d: d.drop_text and not d.drop_image), 0.2),
        (rate(lambda d: d.drop_text and d.drop_image), 0.05),
        (rate(lambda d: d.flip_reference), 0.3),
        (rate(lambda d: d.flip_target), 0.4),
    ):
        assert abs(found - expected) < 4 * (expected * (1 - expected) / n) ** 0.5
    assert sources.draw(chances, 1, 2) == sources.draw(chances, 1, 2)
    others = [(chances, 2, 2), (chances, 1, 3), (dataclasses.replace(chances, seed=1), 1, 2)]
    assert all(sources.draw(*other) != sources.draw(chances, 1, 2) for other in others)


def test_chances_do_not_depend_on_each_other():
    chances = DataConfig(drop_image=0.4, drop_text=0, drop_both=0, flip_reference=0.5, flip_target=0.5)
    draws = [sources.draw(chances, 0, row) for row in range(4000)]
    decisions = np.array([(d.drop_image, d.flip_reference, d.flip_target, *d.crop) for d in draws], float)
    assert np.abs(np.corrcoef(decisions.T) - np.eye(6)).max() < 0.08  # 5 standard deviations


def test_a_crop_reaches_the_batch(folder):
    chances = config(folder, **PLAIN | dict(crop_reference=0.3))
    batch = sources.Pictures(open_dataset(folder), chances, WordIds()).read(np.array([1]), SQUARE, 5)
    part = sources.crop(data.chelsea(), *sources.draw(chances, 5, 1).crop)
    assert part.shape != data.chelsea().shape
    np.testing.assert_array_equal(batch.reference[0, 0], images.clip_pixels(part, 32))


@pytest.mark.parametrize(
    ("drops", "image_kept", "text_kept"),
    [
        (dict(drop_image=1.0), False, True),
        (dict(drop_text=1.0), True, False),
        (dict(drop_both=1.0), False, False),
        ({}, True, True),
    ],
)
def test_drops_reach_the_batch(folder, drops, image_kept, text_kept):
    (batch,) = take(make_loader(config(folder, **PLAIN | drops), WordIds(), global_batch=4), 1)
    assert batch.keep_image.tolist() == [float(image_kept)] * 4
    for ids in (batch.t5_ids, batch.clip_ids):
        assert ids.any(axis=1).tolist() == [text_kept] * 4
    assert np.abs(batch.reference).max() > 0.5  # the pixels stay: keep_image says what counts


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
            joined = type(batch)(*(np.concatenate(xs) for xs in zip(*(part[step] for part in parts), strict=True)))
            assert same([joined], [batch])
    steps = make_loader(config(folder), WordIds(), global_batch=8).plan.steps_per_epoch
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
            assert isinstance(first[0], sources.Batch)
            if workers == 1:
                loader.set_state(state)
                assert same(take(loader, 4), rest)
        finally:
            loader.close()


def test_resume_within_and_across_epochs(folder):
    def loader():
        return make_loader(config(folder), WordIds(), global_batch=4)

    straight = loader()
    assert straight.plan.steps_per_epoch == 10
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
        return sources.Draw(rows * 10, np.full(len(rows), bucket.width), np.full(len(rows), epoch), 0, (rows, rows + 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_any_reader_is_fed_by_the_same_plan(folder, workers):
    from dynaip_jax.data.loader import BatchIterator

    plan = sources.make_plan(config(folder), open_dataset(folder), 4)
    features = BatchIterator(plan, Precomputed(), positions=np.arange(4), workers=workers, prefetch=1)
    found = take(features, 12)
    features.close()
    for batch, (rows, widths, epochs, _, pair) in zip(
        take(make_loader(config(folder), WordIds(), global_batch=4), 12), found, strict=True
    ):
        np.testing.assert_array_equal(rows, batch.row * 10)
        assert isinstance(pair, tuple)
        np.testing.assert_array_equal(pair, (batch.row, batch.row + 1))
        assert set(widths) == {batch.target.shape[2]} and len(set(epochs)) == 1
    assert [b[2][0] for b in found] == [0] * 10 + [1] * 2


@pytest.mark.parametrize("ending", ["runs out", "is killed"])
def test_workers_end_with_the_trainer_and_not_before(folder, ending):
    """A script that never closes its loader, and one killed with -9 after a SIGTERM to its whole process group."""
    code = f"""
import signal, sys, time
from tests.data.test_samples import config, WordIds
from dynaip_jax.data.samples import make_loader
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
    with pytest.raises(UserError, match="data.workers 1: .* exit code -9; .*--shm-size"):
        take(loader, 20)
    loader.close()


# --- errors


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (dict(drop_image=-0.1), "data.drop_image -0.1"),
        (dict(drop_text=1.5), "data.drop_text 1.5"),
        (dict(drop_image=0.5, drop_text=0.6), "data.drop_image + drop_text + drop_both 1.15"),
        (dict(flip_reference=2), "data.flip_reference 2"),
        (dict(flip_target=float("nan")), "data.flip_target nan"),
        (dict(crop_reference=0), "data.crop_reference 0"),
        (dict(clip_size=0), "data.clip_size 0"),
        (dict(seed=-1), "data.seed -1"),
        (dict(workers=-1), "data.workers -1"),
        (dict(prefetch=0), "data.prefetch 0"),
        (dict(square="stretch"), "data.square 'stretch'"),
        (dict(resolution=10), "resolution 10"),
        (dict(aspects=("wide",)), "aspect 'wide'"),
    ],
)
def test_bad_config(changes, found):
    with pytest.raises(UserError, match="expected") as e:
        DataConfig(**changes)
    assert found in str(e.value)


def test_bad_loaders(folder):
    for changes, batch, found in (
        (dict(path=""), 4, "data.path: not given"),
        (dict(path=str(folder / "missing")), 4, "missing: no dataset_info.json"),
        ({}, 45, "44 rows for a global batch of 45"),
        (dict(remove_background=True), 4, "33 of 44 rows of .* have no mask .row 1 is"),
    ):
        with pytest.raises(UserError, match=found):
            make_loader(config(folder, **changes), WordIds(), global_batch=batch)


def test_a_poor_bucket_is_warned_of(folder):
    with pytest.warns(UserWarning, match="bucket 1:1: 11 rows do not fill a batch of 12"):
        loader = make_loader(config(folder), WordIds(), global_batch=12)
    assert loader.plan.steps_per_epoch == 3


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


def test_the_index_alone_makes_the_plan(tmp_path):
    path = make_dataset(tmp_path, times=2)
    with np.load(path / INDEX) as index:
        np.testing.assert_array_equal(index["sizes"][:4], [(512, 512), (300, 451), (400, 600), (427, 640)])
    first = entries(tmp_path)[0]
    assert open_dataset(path)[0].subject == first["subject"]
