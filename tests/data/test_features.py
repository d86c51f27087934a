"""Cached features, in the absence of encoders."""

import json

import numpy as np
import pytest

from dynaip_jax.data import features
from dynaip_jax.data.features import Cached, Store, moments_name
from dynaip_jax.data.loader import make_loader
from dynaip_jax.data.order import make_order
from dynaip_jax.data.records import open_dataset
from dynaip_jax.data.samples import draw
from dynaip_jax.errors import UserError
from tests.data.photos import WordIds, config, take

VARIANTS = 2
DROPS = dict(drop_image=0.3, drop_text=0.3, drop_both=0.1)


def write(path, settings, *, pooled=True, levels=True):
    """A cache of random features for batches of 4; returns its arrays."""
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
    content = dict(format=features.FORMAT, format_version=features.VERSION, variants=VARIANTS, facts=made_of)
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


@pytest.fixture
def checked(folder, tmp_path):
    """Settings and a cache as train.cache writes it; `read` gives all its batches of two epochs."""
    settings, dataset = config(folder, features=str(tmp_path / "cache")), open_dataset(folder)
    arrays = write(tmp_path / "plain", settings)
    order, store, rows = make_order(settings, dataset, 4), Store(tmp_path / "cache", "float32"), np.arange(len(dataset))
    (tmp_path / "cache").mkdir()
    for name, x in arrays.items():
        index = ((),) if name.startswith("empty") else ((rows,),) if name in ("states", "pooled") else None
        for where in index or [(variant, np.arange(x.shape[1])) for variant in range(VARIANTS)]:
            store.put(name, x.shape, where, x[where])
    store.finish()
    features.write_facts(
        tmp_path / "cache", features.facts(settings, order, "encoders", "float32", dataset.content), VARIANTS
    )

    def read():
        cached = Cached.open(settings, dataset, order, "encoders")
        members = [(np.flatnonzero(order.bucket_of == n), bucket) for n, bucket in enumerate(order.buckets)]
        return [cached.read(rows, bucket, epoch) for epoch in range(VARIANTS) for rows, bucket in members]

    return tmp_path / "cache", {name: np.array(x) for name, x in arrays.items()}, read, settings


def test_checksums_let_whole_caches_through(checked):
    _, arrays, read, settings = checked
    batches = read()
    np.testing.assert_array_equal(np.sort(np.concatenate([b.row for b in batches])), np.repeat(np.arange(44), VARIANTS))
    for batch in batches:
        for n, row in enumerate(batch.row):
            drops = [draw(settings, epoch, int(row)).drop_text for epoch in range(VARIANTS)]
            wanted = [arrays["empty_pooled"] if drop else arrays["pooled"][row] for drop in drops]
            assert any(np.array_equal(batch.pooled[n], x) for x in wanted)


def test_no_flipped_bit_is_trained_on(checked):
    path, _, read, _ = checked
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        data = bytearray(whole)
        data[-3] ^= 1
        file.write_bytes(data)
        name = file.name.removesuffix(".checks.npy").removesuffix(".npy")
        with pytest.raises(UserError, match=rf"{name}.npy: cannot be read .row .* is damaged|features.json"):
            read()
        file.write_bytes(whole)
    for name in (
        "states.checks.npy",
        "levels.npy",
        "pooled.npy",
    ):  # without listing them, the last two would not be missed
        whole = (path / name).read_bytes()
        (path / name).unlink()
        with pytest.raises(UserError, match=f"{name.split('.')[0]}.npy: cannot be read"):
            read()
        (path / name).write_bytes(whole)


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
    path, _, read, _ = checked
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
