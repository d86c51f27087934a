"""Cached features: training from them is training from the pictures."""

import dataclasses
import json

import numpy as np
import pytest

from dynaip_jax.data import features
from dynaip_jax.errors import UserError
from tests.train.runs import contents, losses
from train import cache as caching
from train.cache import cache
from train.config import DistributedConfig
from train.loop import train
from train.parts import Share


@pytest.fixture(scope="module")
def augmented(config):
    """Several epochs (8 rows in batches of 2), flips, crops and drops of every kind, two shapes of picture."""
    data = dataclasses.replace(
        config.data, flip_reference=0.5, crop_reference=0.6, drop_image=0.2, drop_text=0.2, drop_both=0.1, aspects=("1:1", "3:2")
    )  # fmt: skip
    return dataclasses.replace(config, data=data, batch=2, steps=10, save_every=10)


def with_features(config, folder):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, features=str(folder)))


def test_a_cached_run_is_the_run_itself(augmented, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "ROWS_A_PART", 3)
    cache(augmented, tmp_path / "cache", variants=4)
    train(augmented, tmp_path / "pictures")
    train(with_features(augmented, tmp_path / "cache"), tmp_path / "cached")
    pictures, cached = losses(tmp_path / "pictures"), losses(tmp_path / "cached")
    np.testing.assert_allclose(cached, pictures, rtol=1e-5)
    cache(augmented, tmp_path / "one", variants=1)
    train(with_features(augmented, tmp_path / "one"), tmp_path / "other")
    other = losses(tmp_path / "other")
    assert other[:2] == pytest.approx(cached[:2], rel=1e-5) and other != pytest.approx(cached, rel=1e-5)


def test_a_base_is_trained_from_a_cache_without_levels(augmented, tmp_path):
    base = dataclasses.replace(augmented, trainable="base", steps=4)
    cache(base, tmp_path / "cache", variants=2)
    assert not (tmp_path / "cache" / "part-000000" / "levels.npy").exists()
    train(base, tmp_path / "pictures")
    train(with_features(base, tmp_path / "cache"), tmp_path / "cached")
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "pictures"), rtol=1e-5)
    with pytest.raises(UserError, match="made with encoders"):
        train(with_features(augmented, tmp_path / "cache"), tmp_path / "adapter")


def test_bfloat16_features_are_near(augmented, tmp_path):
    half = dataclasses.replace(augmented, dtype="bfloat16", steps=3)
    cache(half, tmp_path / "cache")
    assert np.load(tmp_path / "cache" / "part-000000" / "levels.npy").dtype == np.uint16
    train(with_features(half, tmp_path / "cache"), tmp_path / "cached")
    train(half, tmp_path / "pictures")
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "pictures"), rtol=2e-2)


def test_a_cache_made_otherwise_is_refused(augmented, tmp_path):
    cache(augmented, tmp_path / "cache")
    cached = with_features(augmented, tmp_path / "cache")
    cropped = dataclasses.replace(cached, data=dataclasses.replace(cached.data, crop_reference=0.9))
    levels = dataclasses.replace(cached, adapter=dataclasses.replace(cached.adapter, levels=(1, 2, 3)))
    for config_, message in (  # noqa: F402
        (cropped, "made with crop_reference 0.6; this run has 0.9"),
        (levels, "made with encoders"),
        (dataclasses.replace(cached, batch=4), "made with plan"),
        (with_features(augmented, tmp_path), "no readable features.json"),
    ):
        with pytest.raises(UserError, match=message):
            train(config_, tmp_path / "run", overwrite=True)
    (tmp_path / "cache" / "part-000000" / "pooled.npy").write_bytes(b"x")
    with pytest.raises(UserError, match="pooled.npy: cannot be read"):
        train(cached, tmp_path / "run", overwrite=True)
    with pytest.raises(UserError, match="already exists"):
        cache(augmented, tmp_path / "cache")
    broken = json.loads((tmp_path / "cache" / "features.json").read_text())
    (tmp_path / "cache" / "features.json").write_text(json.dumps(broken | dict(format_version=9)))
    with pytest.raises(UserError, match="dynaip-features 9"):
        train(cached, tmp_path / "run", overwrite=True)


def test_what_is_finished_is_not_done_again(augmented, tmp_path, monkeypatch, capsys):
    """After a stop, after a change of options, and by several processes with a share each; byte for byte the same comes of it."""
    monkeypatch.setattr(features, "ROWS_A_PART", 3)  # of 8
    out, parts = tmp_path / "cache", tmp_path / ".cache.parts"
    write, made, stops = features.write_part, [], [1]

    def written(folder, key, number, bucket_of):
        made.append(number)
        if number in stops:
            stops.clear()
            raise KeyboardInterrupt
        write(folder, key, number, bucket_of)

    monkeypatch.setattr(features, "write_part", written)
    with pytest.raises(KeyboardInterrupt):
        cache(augmented, out, variants=2)
    assert [p.name for p in tmp_path.iterdir()] == [".cache.parts"]
    assert [p.name for p in parts.iterdir()] == ["part-000000"]
    (parts / "part-000001.0123abcd.making").mkdir()  # of a killed one
    cache(augmented, out, variants=2)
    assert made == [0, 1, 1, 2] and [p.name for p in tmp_path.iterdir()] == ["cache"]
    assert "1 of 3 parts are finished already" in capsys.readouterr().err

    cache(augmented, tmp_path / "shared", variants=1, share=Share(1, 2))
    made.clear()
    cache(augmented, tmp_path / "shared", variants=2, share=Share(1, 2))
    assert made == [0, 2] and not (tmp_path / "shared").exists()
    monkeypatch.setattr(features, "write_part", write)
    cache(augmented, tmp_path / "shared", variants=2, share=Share(2, 2))
    monkeypatch.setattr(caching, "Encoding", None)
    cache(augmented, tmp_path / "shared", variants=2)
    assert contents(tmp_path / "shared") == contents(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "shared"]


def test_a_part_that_cannot_be_written_or_is_being_made(augmented, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / ".out.parts").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(features, "write_part", full)
        with pytest.raises(
            UserError,
            match=r"`out`: .*/.out.parts cannot be written .No space left on device.; finished parts are kept",
        ):
            cache(augmented, tmp_path / "out", share=Share(1, 1))
    assert not list((tmp_path / ".out.parts").iterdir())
    with pytest.raises(UserError, match=r"`distributed.enabled`: .* pass --share I/N"):
        cache(dataclasses.replace(augmented, distributed=DistributedConfig(True)), tmp_path / "out")
