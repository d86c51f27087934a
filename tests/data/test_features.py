"""Cached features, in the absence of encoders."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from dynaip_jax.data import features
from dynaip_jax.data.cached import OPEN_AT_ONCE, Cached
from dynaip_jax.data.features import Store, moments_name
from dynaip_jax.data.loader import make_loader
from dynaip_jax.data.order import make_order
from dynaip_jax.data.records import open_dataset
from dynaip_jax.data.samples import draw
from dynaip_jax.errors import UserError
from tests.data.caches import VARIANTS, as_before_parts, write_cache
from tests.data.photos import WordIds, config, take

DROPS = dict(drop_image=0.3, drop_text=0.3, drop_both=0.1)


def write(path, settings, *, pooled=True, levels=True):
    """A cache of random features for batches of 4, of before there were parts and checksums; returns its arrays."""
    path.mkdir()
    dataset = open_dataset(settings.path)
    order, store, rng = make_order(settings, dataset, 4), Store(path, "float32"), np.random.default_rng(0)
    shapes = dict(states=(len(dataset), 8, 6), empty_states=(8, 6))
    shapes |= dict(pooled=(len(dataset), 5), empty_pooled=(5,)) if pooled else {}
    shapes |= dict(levels=(VARIANTS, len(dataset), 3, 7, 6)) if levels else {}
    for number, bucket in enumerate(order.buckets):
        rows = int(np.count_nonzero(order.bucket_of == number))
        shapes[moments_name(bucket)] = (VARIANTS, rows, bucket.height // 8, bucket.width // 8, 4)
    arrays = {}
    for name, shape in shapes.items():
        arrays[name] = store.create(name, shape)
        arrays[name][...] = rng.normal(size=shape)
        arrays[name].base.flush()
    made_of = features.facts(settings, order, "encoders", "float32", dataset.content)
    content = dict(format=features.FORMAT, format_version=features.WHOLE, variants=VARIANTS, facts=made_of)
    (path / features.FILE).write_text(json.dumps(content))
    return arrays


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [{}, dict(pooled=False), dict(levels=False)])
def test_batches_are_those_of_the_cache(folder, tmp_path, workers, kind):
    settings = config(folder, features=str(tmp_path / "cache"), workers=workers, **DROPS)
    arrays = write(tmp_path / "cache", settings, **kind)
    loader = make_loader(settings, WordIds(), global_batch=4, encoders="encoders")
    slots = features.slots(loader.order.bucket_of)
    for step, batch in enumerate(take(loader, 12)):
        epoch = step // loader.order.steps_per_epoch
        assert (batch.pooled is None) == ("pooled" not in arrays) and (batch.levels is None) == ("levels" not in arrays)
        bucket = loader.order.step(step).bucket
        for n, row in enumerate(batch.row):
            chance = draw(settings, epoch, int(row))
            assert batch.keep_image[n] == (not chance.drop_image)
            moments = arrays[moments_name(bucket)][epoch % VARIANTS, slots[row]]
            np.testing.assert_array_equal(batch.moments[n], moments)
            for name, values in (("states", batch.states), ("pooled", batch.pooled)):
                if values is not None:
                    expected = arrays[f"empty_{name}"] if chance.drop_text else arrays[name][row]
                    np.testing.assert_array_equal(values[n], expected)
            for level, values in enumerate(batch.levels or ()):
                np.testing.assert_array_equal(values[n, 0], arrays["levels"][epoch % VARIANTS, row, level])
    loader.close()


def test_a_lost_array_is_told(folder, tmp_path):
    settings = config(folder, features=str(tmp_path / "cache"))
    write(tmp_path / "cache", settings)
    (tmp_path / "cache" / "pooled.npy").unlink()
    with pytest.raises(UserError, match="pooled.npy: cannot be read"):
        take(make_loader(settings, WordIds(), global_batch=4, encoders="encoders"), 1)


@pytest.fixture(params=["parts", "whole"])
def checked(request, folder, tmp_path, monkeypatch):
    """Settings and a cache as train.cache writes it, or as it did before there were parts; `read` gives all its batches of two epochs."""
    settings, dataset, path = config(folder, features=str(tmp_path / "cache")), open_dataset(folder), tmp_path / "cache"
    if request.param == "parts":
        monkeypatch.setattr(features, "ROWS_A_PART", 16)  # of 44
    write_cache(path, settings)
    if request.param == "whole":
        as_before_parts(path)
    order = make_order(settings, dataset, 4)

    def read():
        cached = Cached.open(settings, dataset, order, "encoders")
        members = [(np.flatnonzero(order.bucket_of == n), bucket) for n, bucket in enumerate(order.buckets)]
        return [cached.read(rows, bucket, epoch) for epoch in range(VARIANTS) for rows, bucket in members]

    return path, read, settings


def stored(path, order, name, row, *variant):
    """The values of a row in a cache, found without its reader."""
    parts = sorted(path.glob("part-*")) or [path]
    place = row
    for part, start in zip(parts, range(0, len(order.bucket_of), features.ROWS_A_PART), strict=False):
        bucket_of = order.bucket_of[start:][: features.ROWS_A_PART] if parts[1:] else order.bucket_of
        if place < len(bucket_of):
            if name.startswith("moments"):
                place = int(np.count_nonzero(bucket_of[:place] == bucket_of[place]))
            return np.load(part / f"{name}.npy")[(*variant, place)]
        place -= len(bucket_of)


def test_checksums_let_whole_caches_through(checked):
    path, read, settings = checked
    order, batches = make_order(settings, open_dataset(settings.path), 4), read()
    np.testing.assert_array_equal(np.sort(np.concatenate([b.row for b in batches])), np.repeat(np.arange(44), VARIANTS))
    for number, batch in enumerate(batches):
        epoch, bucket = divmod(number, len(order.buckets))
        moments = moments_name(order.buckets[bucket])
        for n, row in enumerate(batch.row):
            drop = draw(settings, epoch, int(row)).drop_text
            for name, values in (("states", batch.states), ("pooled", batch.pooled)):
                if not drop:
                    np.testing.assert_array_equal(values[n], stored(path, order, name, row))
            np.testing.assert_array_equal(batch.moments[n], stored(path, order, moments, row, epoch))
            np.testing.assert_array_equal([x[n, 0] for x in batch.levels], stored(path, order, "levels", row, epoch))


def test_no_flipped_bit_is_trained_on(checked):
    path, read, _ = checked
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert len(files) > 10
    for file in files:
        whole = file.read_bytes()
        data = bytearray(whole)
        data[-3] ^= 1
        file.write_bytes(data)
        name = file.name.removesuffix(".checks.npy").removesuffix(".npy")
        if not name.startswith("empty"):  # they are read where a text is dropped
            with pytest.raises(
                UserError,
                match=rf"{name}.npy: cannot be read .row .* is damaged|features.json|part.json: cannot be read",
            ):
                read()
        file.write_bytes(whole)
    for file in files:  # without listing them, some would not be missed
        if file.name in ("states.checks.npy", "levels.npy", "pooled.npy", features.PART):
            file.rename(path / "aside")
            with pytest.raises(UserError, match=f"{file.name.split('.')[0]}.(npy|json): cannot be read"):
                read()
            (path / "aside").rename(file)
    assert read()


def test_a_damaged_empty_prompt_is_not_trained_on(folder, tmp_path):
    settings = config(folder, features=str(tmp_path / "cache"), drop_text=1.0, drop_image=0.0, drop_both=0.0)
    write_cache(tmp_path / "cache", settings)
    loader = make_loader(settings, WordIds(), global_batch=4, encoders="encoders")
    part = tmp_path / "cache" / features.part_name(0)
    np.testing.assert_array_equal(next(loader).states[0], np.load(part / "empty_states.npy"))
    loader.close()
    data = bytearray((part / "empty_states.npy").read_bytes())
    data[-3] ^= 1
    (part / "empty_states.npy").write_bytes(data)
    with pytest.raises(UserError, match=r"empty_states.npy: cannot be read .row .* is damaged"):
        next(make_loader(settings, WordIds(), global_batch=4, encoders="encoders"))


def test_parts_of_other_caches_and_places_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "ROWS_A_PART", 16)
    settings, dataset = config(folder, features=str(tmp_path / "cache")), open_dataset(folder)
    write_cache(tmp_path / "cache", settings)
    write_cache(tmp_path / "other", settings, variants=1)
    order, part = make_order(settings, dataset, 4), tmp_path / "cache" / features.part_name(1)
    rows = np.flatnonzero(order.bucket_of == order.bucket_of[20])
    for source in (tmp_path / "cache" / features.part_name(0), tmp_path / "other" / features.part_name(1)):
        part.rename(tmp_path / "aside")
        part.symlink_to(source)
        with pytest.raises(UserError, match=r"part-000001/part.json: cannot be read .it is a part of another cache"):
            Cached.open(settings, dataset, order, "encoders").read(rows, order.buckets[order.bucket_of[20]], 0)
        part.unlink()
        (tmp_path / "aside").rename(part)


def test_few_parts_are_open_and_workers_get_nothing_of_all_rows(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "ROWS_A_PART", 2)  # of 44
    settings, dataset = config(folder, features=str(tmp_path / "cache")), open_dataset(folder)
    write_cache(tmp_path / "cache", settings)
    order = make_order(settings, dataset, 4)
    many = SimpleNamespace(fingerprint=order.fingerprint, bucket_of=np.zeros(10**6, np.int8))
    cached = pickle.loads(pickle.dumps(Cached.open(settings, dataset, many, "encoders")))
    for _ in range(2):
        for number, bucket in enumerate(order.buckets):
            cached.read(np.flatnonzero(order.bucket_of == number), bucket, 0)
    assert len(cached.parts._open) == OPEN_AT_ONCE < features.parts(44)
    assert len(pickle.dumps(cached)) < 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(variants=1), "its checksum is another"),
        (dict(variants=0), "0 variants"),
        (dict(variants=True), "variants True: expected a whole number"),
        (dict(facts=3), "facts 3: expected an object"),
        (dict(surplus=3), "'surplus' is missing or unknown"),
        (dict(facts=dict(dtype="float64", data={})), "variants of 'float64'"),
    ],
)
def test_what_a_cache_says_of_itself(checked, changes, message):
    path, read, _ = checked
    (path / features.FILE).write_text(json.dumps(json.loads((path / features.FILE).read_text()) | changes))
    with pytest.raises(UserError, match=f"no readable features.json .*{message}"):
        read()


def test_caches_that_do_not_fit(folder, tmp_path):
    settings = config(folder, features=str(tmp_path / "cache"))
    dataset = open_dataset(folder)
    with pytest.raises(UserError, match="`data.features` .*/cache: no readable features.json"):
        Cached.open(settings, dataset, make_order(settings, dataset, 4), "encoders")
    write(tmp_path / "cache", settings)
    with pytest.raises(
        UserError, match="`data.features` .*/cache: made with encoders 'encoders'; this run has 'others'"
    ):
        Cached.open(settings, dataset, make_order(settings, dataset, 4), "others")
    with pytest.raises(UserError, match="`data.features` .*/cache: made with plan"):
        Cached.open(settings, dataset, make_order(settings, dataset, 2), "encoders")


def test_a_cache_in_a_bucket_is_refused(folder, bucket):
    settings = config(folder, features=f"{bucket}/cache")
    with pytest.raises(
        UserError, match="`data.features` gs://bucket/cache: .* a bucket does not allow; expected a local folder"
    ):
        make_loader(settings, WordIds(), global_batch=4)
