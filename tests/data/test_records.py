"""Datasets on disk."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dynaip_jax.data import records as store
from dynaip_jax.data.columns import Column
from dynaip_jax.errors import UserError
from dynaip_jax.storage.folders import as_path, copy_tree, replacing
from tests.fake_bucket import FakeBucket

BOX = np.array([0, 10, 200, 110], np.int32)


def record(number, **changes):
    given = store.Record(number, b"target %d" % number, BOX, b"", BOX + number, b"", "a cät", "cät")
    return given._replace(**changes)


@pytest.fixture
def folder(tmp_path):
    store.write_dataset(tmp_path, [record(1), record(3, mask=b"mask"), record(4, reference=b"\x00\xff", subject="")])
    return tmp_path


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_what_is_written_is_read(folder):
    dataset = store.open_dataset(folder)
    assert len(dataset) == 3
    assert same(dataset[1], record(3, mask=b"mask")) and same(dataset[2], record(4, reference=b"\x00\xff", subject=""))
    np.testing.assert_array_equal(dataset.sizes, [[200, 100]] * 3)
    assert dataset.numbers.tolist() == [1, 3, 4] and dataset.masked.tolist() == [False, True, False]
    assert same(pickle.loads(pickle.dumps(dataset))[0], record(1))


def test_order_is_kept_over_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROWS_A_SHARD", 7)
    assert store.write_dataset(tmp_path, (record(n) for n in range(1, 101))) == 100
    dataset = store.open_dataset(tmp_path)
    assert len(list(tmp_path.glob("*array_record*"))) == 15
    assert [dataset[n].number for n in range(100)] == dataset.numbers.tolist() == list(range(1, 101))


@pytest.mark.parametrize(
    "changes",
    [dict(caption="a cat"), dict(target=b"tarGet 1"), dict(target_box=BOX + 1), dict(mask=b"m"), dict(subject="")],
)
def test_a_dataset_is_known_by_what_is_trained_on(tmp_path, changes):
    """Not by its folder, nor by the numbers of its rows in their source."""
    contents = []
    for name, first in (("a", record(1)), ("b", record(1)._replace(number=9)), ("c", record(1, **changes))):
        (tmp_path / name).mkdir()
        store.write_dataset(tmp_path / name, [first, record(2)])
        contents.append(store.open_dataset(tmp_path / name).content)
    assert contents[0] == contents[1] != contents[2] and len(contents[0]) == 64
    swapped = tmp_path / "d"
    swapped.mkdir()
    store.write_dataset(swapped, [record(2), record(1)])
    assert store.open_dataset(swapped).content not in contents


def test_shards_of_another_dataset_are_noticed(folder, tmp_path):
    """Same rows by number and size, other pictures; the index is that of before."""
    other = tmp_path / "other"
    other.mkdir()
    store.write_dataset(other, [record(1), record(3, mask=b"mask", target=b"another"), record(4)])
    for shard in other.glob("*array_record*"):
        (folder / shard.name).write_bytes(shard.read_bytes())
    dataset = store.open_dataset(folder)
    assert dataset[0].number == 1
    with pytest.raises(UserError, match="row 1 is damaged .its checksum is not the one in index.npz"):
        dataset[1]


def test_another_process_reads_single_values_of_the_index(folder):
    """And notices a dataset that took the place of the one it knows."""
    dataset = store.open_dataset(folder)
    sent = pickle.dumps(dataset)
    assert len(sent) < 500
    copy = pickle.loads(sent)
    assert isinstance(copy.numbers, Column) and len(copy) == 3 and copy.content == dataset.content
    assert all(same(copy[n], dataset[n]) for n in range(3))
    again = pickle.loads(pickle.dumps(copy))
    assert isinstance(again.numbers, Column) and same(again[2], dataset[2])
    for file in folder.iterdir():
        file.unlink()
    store.write_dataset(folder, [record(n, caption="other") for n in (1, 3, 4)])
    with pytest.raises(UserError, match="index.npz is damaged .the dataset was replaced while it was read"):
        pickle.loads(sent)


def test_an_older_index_without_digests_is_read(folder):
    with np.load(folder / store.INDEX) as index:
        older = {name: index[name] for name in ("sizes", "numbers", "masked")}
    np.savez(folder / store.INDEX, **older)
    dataset = store.open_dataset(folder)
    assert dataset.content == "" and dataset[1].number == 3


def test_no_tensorflow(folder):
    code = (
        "import sys; from dynaip_jax.data.records import *; import pathlib\n"
        f"d = open_dataset({str(folder)!r}); out = pathlib.Path({str(folder)!r}) / 'again'; out.mkdir()\n"
        "write_dataset(out, [d[n] for n in range(3)])\n"
        "assert len(open_dataset(out)) == 3 and 'tensorflow' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_tfds_itself_reads_it(folder):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    assert builder.info.splits["train"].num_examples == 3
    assert builder.as_data_source("train")[0]["target"] == b"target 1"


def test_empty(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        store.write_dataset(tmp_path, [])


def test_not_a_dataset(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="train.prepare") as e:
            store.open_dataset(path)
        assert str(path) in str(e.value)


def test_damage(folder):
    shard = next(folder.glob("*array_record*"))
    whole = shard.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], bytes(len(whole))):
        shard.write_bytes(broken)
        with pytest.raises(UserError, match=f"dataset {folder}: .* damaged .*run it again") as e:
            store.open_dataset(folder)[0]
        assert "\n" not in str(e.value)
    shard.write_bytes(whole)
    assert store.open_dataset(folder)[0].number == 1

    index = folder / store.INDEX
    whole = index.read_bytes()
    index.write_bytes(whole[:100])
    with pytest.raises(UserError, match="index.npz is damaged"):
        store.open_dataset(folder)
    np.savez(index, sizes=np.zeros((2, 2)), numbers=np.zeros(2), masked=np.zeros(2))
    with pytest.raises(UserError, match="2 rows, the shards hold 3"):
        store.open_dataset(folder)
    np.savez(index, sizes=np.zeros((3, 2)), numbers=np.array([1, 2, 4]), masked=np.zeros(3))
    with pytest.raises(UserError, match="row 1 is damaged .it says 3, index.npz says 2"):
        store.open_dataset(folder)[1]
    index.write_bytes(whole)
    (folder / store.INFO).write_text("{")
    with pytest.raises(UserError, match="dataset_info.json is damaged"):
        store.open_dataset(folder)


class Trap:
    """Runs code where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_an_index_with_a_pickle_is_not_loaded(folder):
    trapped = np.array([Trap(folder / "sprung")] * 3, object)
    np.savez(folder / store.INDEX, sizes=np.zeros((3, 2)), numbers=np.array([1, 3, 4]), masked=trapped)
    with pytest.raises(UserError, match="index.npz is damaged"):
        store.open_dataset(folder)
    assert not (folder / "sprung").exists()


def test_a_dataset_in_a_bucket(folder, bucket, monkeypatch):
    """All but reading shards, for which array_record asks Google's servers."""
    path, real, asked = f"{bucket}/data/one", store._records, []
    with pytest.raises(UserError, match=f"dataset {path}: no dataset_info.json"):
        store.open_dataset(path)
    copy_tree(folder, as_path(path))

    def records(address, *stated):
        asked.append(str(address))
        return real(folder, *stated)

    monkeypatch.setattr(store, "_records", records)
    dataset = pickle.loads(pickle.dumps(store.open_dataset(path)))
    assert str(dataset.path) == path and set(asked) == {path}
    assert dataset.numbers.tolist() == [1, 3, 4] and same(dataset[0], record(1))
    (as_path(path) / store.INDEX).write_bytes(b"torn")
    with pytest.raises(UserError, match="dataset gs://bucket/data/one: index.npz is damaged"):
        store.open_dataset(path)


def test_writing_a_dataset_to_a_bucket(tmp_path, bucket):
    with replacing(f"{bucket}/data", overwrite=False, marks=(store.INDEX,)) as work:
        store.write_dataset(work, [record(1)])
    assert FakeBucket.written[-1] == f"/bucket/data/{store.INDEX}"
    copy_tree(as_path(f"{bucket}/data"), tmp_path)
    assert same(store.open_dataset(tmp_path)[0], record(1))


def test_nothing_that_a_dataset_names_is_imported(folder, tmp_path_factory):
    """tfds imports the classes that a `features.json` names, a module beside the caller among them."""
    beside = tmp_path_factory.mktemp("beside")
    (beside / "trap.py").write_text("open('sprung', 'w')\n\nclass Text:\n    pass\n")
    features = (folder / store.FEATURES).read_text()
    for name in ("text_feature.Text", "features_dict.FeaturesDict"):
        (folder / store.FEATURES).write_text(features.replace(f"tensorflow_datasets.core.features.{name}", "trap.Text"))
        code = f"from dynaip_jax.data.records import open_dataset; print(open_dataset({str(folder)!r})[0].number)"
        environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(beside), str(Path(__file__).parents[2])]))
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=beside, env=environment, timeout=120, capture_output=True, text=True
        )
        assert done.stdout == "1\n", done.stderr
        assert not (beside / "sprung").exists()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (store.FEATURES, lambda s: s["featuresDict"]["features"].pop("mask"), "mask: found None"),
        (
            store.FEATURES,
            lambda s: s["featuresDict"]["features"]["number"]["tensor"].update(dtype="float32"),
            "number: found",
        ),
        (store.FEATURES, lambda s: s.update(featuresDict=[]), "features.json is damaged"),
        (store.INFO, lambda s: s["splits"][0].update(shardLengths=["2"]), "3 rows, the shards hold 2"),
        (store.INFO, lambda s: s["splits"][0].update(shardLengths=[3]), "shardLengths 3: expected text"),
        (store.INFO, lambda s: s["splits"][0].update(filepathTemplate="/dev/zero"), "shards named '/dev/zero'"),
        (store.INFO, lambda s: s.update(splits={}), "dataset_info.json is damaged"),
    ],
)
def test_what_a_dataset_says_of_itself_is_compared(folder, file, change, message):
    stated = json.loads((folder / file).read_text())
    change(stated)
    (folder / file).write_text(json.dumps(stated))
    with pytest.raises(UserError, match=f"dataset {folder}: .*{message}"):
        store.open_dataset(folder)


def test_rows_that_cannot_be(tmp_path):
    for change, message in (
        (dict(reference_box=np.array([0, 0, 0, 5], np.int32)), "expected top, left, bottom, right"),
        (dict(reference_box=np.array([-4, 0, 9, 5], np.int32)), "expected top, left, bottom, right"),
    ):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        out.mkdir()
        store.write_dataset(out, [record(1, **change)])
        with pytest.raises(UserError, match=f"row 0 is damaged .*{message}"):
            store.open_dataset(out)[0]
