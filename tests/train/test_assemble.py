"""A run's parts: what a config asks for reaches them, and each is opened once."""

import sys

from dynaip_jax.storage.bundle import Bundle
from tests.train.runs import refused, words
from train import config as config_
from train.assemble import assembled
from train.run import Run


def test_query_and_merge_reach_adapter_and_transformer(config):
    chosen = config_.override(config, ["--adapter.query", "after_rope", "--adapter.merge", "concat"])
    constants = Run(chosen).constants
    injection = constants.family.injection
    assert (constants.adapter.query, constants.adapter.merge) == ("after_rope", "concat")
    assert (injection.query, injection.merge) == ("after_rope", "concat")


def test_a_missing_package_is_told_before_the_folder_is_touched(trainer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    refused(
        trainer,
        words(tmp_path / "run"),
        "training needs tensorboard, which is not installed; pip install -e .",
    )
    assert not (tmp_path / "run").exists()


def test_each_part_is_opened_once(config, tmp_path, monkeypatch):
    opened = []
    bundle, load = Bundle.open, Bundle.load
    monkeypatch.setattr(Bundle, "open", lambda *a: (opened.append("bundle"), bundle(*a))[1])
    monkeypatch.setattr(Bundle, "load", lambda self, name, target: (opened.append(name), load(self, name, target))[1])
    with assembled(config, tmp_path / "run") as run:
        run.first_state()
        assert run.dataset is run.data.reader.dataset and run.frozen is run.frozen
    assert sorted(opened) == ["bundle", "clip_text", "clip_vision", "t5", "transformer", "vae"]
