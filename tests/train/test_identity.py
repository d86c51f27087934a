"""A run knows its dataset, bundle and features by their content: they may move, and may not be replaced."""

import dataclasses
import json
import shutil

import pytest

from dynaip_jax.data.records import INDEX, open_dataset, write_dataset
from dynaip_jax.errors import UserError
from tests.data.caches import as_before_parts
from tests.train.runs import data_state, metrics, refused, words
from train.cache import cache
from train.export import export
from train.loop import train


@pytest.fixture
def folders(photographs, tiny, tmp_path):
    """Copies of the dataset and of the bundle, to be moved and replaced."""
    shutil.copytree(photographs, tmp_path / "data")
    shutil.copytree(tiny[0], tmp_path / "bundle")
    return tmp_path / "data", tmp_path / "bundle"


def replace(folder, **changes):
    """The dataset in `folder` with another first row; sizes, numbers and order are the same."""
    dataset = open_dataset(folder)
    rows = [dataset[n] for n in range(len(dataset))]
    shutil.rmtree(folder)
    folder.mkdir()
    write_dataset(folder, [rows[0]._replace(**changes), *rows[1:]])


def tiny_words(run, bundle, data, *more):
    small = "--adapter.levels 2 3 4 --adapter.expert-width 64 --data.clip-size 32".split()
    return words(run, "--bundle", bundle, "--data.path", data, *small, *more)


def test_data_and_bundle_may_move(trainer, folders, tmp_path):
    data, bundle = folders
    run = tmp_path / "run"
    assert trainer(tiny_words(run, bundle, data, "--steps", 2))[0] == 0
    content = open_dataset(data).content
    assert data_state(run, 2)["content"] == json.loads((run / "run.json").read_text())["data"] == content
    status, lines = trainer(tiny_words(run, bundle, f"{data}/", "--steps", 3, "--resume"))
    assert status == 0 and not any("data.path" in line for line in lines)
    data.rename(tmp_path / "data2")
    bundle.rename(tmp_path / "bundle2")
    status, lines = trainer(tiny_words(run, tmp_path / "bundle2", tmp_path / "data2", "--steps", 4, "--resume"))
    assert status == 0, lines
    assert f"bundle: {bundle} -> {tmp_path}/bundle2 (its content is the same)" in lines
    assert f"data.path: {data} -> {tmp_path}/data2 (its content is the same)" in lines
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    export(run, tmp_path / "adapter", None)
    assert json.loads((tmp_path / "adapter" / "adapter.json").read_text())["conventions"]["dataset"] == content


@pytest.mark.parametrize("fixed", [(), ("--fixed-batch",)])
def test_a_dataset_replaced_in_place_is_refused(trainer, folders, tmp_path, fixed):
    data, bundle = folders
    run = tmp_path / "run"
    assert trainer(tiny_words(run, bundle, data, "--steps", 2, *fixed))[0] == 0
    before = (run / "run.json").read_bytes()
    replace(data, caption="something else")
    again = tiny_words(run, bundle, data, "--steps", 4, "--resume", *fixed)
    refused(trainer, again, f"--resume {run}: trained with other data (")
    assert (run / "run.json").read_bytes() == before
    older = {name: value for name, value in json.loads(before).items() if name not in ("data", "encoders")}
    (run / "run.json").write_text(json.dumps(older))
    refused(trainer, again, "data: the checkpoint was made with other pictures or captions")


def test_other_encoders_are_refused(trainer, folders, tmp_path):
    data, bundle = folders
    run = tmp_path / "run"
    assert trainer(tiny_words(run, bundle, data, "--steps", 2))[0] == 0
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["components"]["t5"]["provenance"] = [dict(made_from="seed 1")]
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    refused(
        trainer, tiny_words(run, bundle, data, "--steps", 4, "--resume"), f"--resume {run}: trained with other encoders ("
    )  # fmt: skip


def test_features_of_other_pictures_are_refused(config, folders, tmp_path):
    """Captions and pictures alike; features may move; those that do not say what they are of are warned of."""
    data, _ = folders
    config = dataclasses.replace(config, batch=2, steps=1, data=dataclasses.replace(config.data, path=str(data)))
    cache(config, tmp_path / "cache")
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    cached = dataclasses.replace(config, data=dataclasses.replace(config.data, features=str(tmp_path / "elsewhere")))
    train(cached, tmp_path / "run")
    replace(data, caption="something else")
    with pytest.raises(UserError, match="made with content [0-9a-f]{12}; this run has [0-9a-f]{12};"):
        train(cached, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    as_before_parts(tmp_path / "elsewhere")
    file = tmp_path / "elsewhere" / "features.json"
    manifest = json.loads(file.read_text())
    del manifest["facts"]["content"], manifest["arrays"], manifest["checksum"]
    file.write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="made before caches knew the content of their dataset"):
        train(cached, tmp_path / "older")


def test_a_dataset_without_a_digest_is_trained_on(config, folders, tmp_path):
    import numpy as np

    data, _ = folders
    with np.load(data / INDEX) as index:
        older = {name: index[name] for name in ("sizes", "numbers", "masked")}
    np.savez(data / INDEX, **older)
    config = dataclasses.replace(config, batch=2, steps=2, data=dataclasses.replace(config.data, path=str(data)))
    train(dataclasses.replace(config, steps=1), tmp_path / "run")
    assert "content" not in data_state(tmp_path / "run", 1)
    train(config, tmp_path / "run", resume=True)
