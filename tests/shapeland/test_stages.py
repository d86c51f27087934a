"""Stages of Shapeland's training, with `--go-on`."""

import itertools
import json

import jax
import numpy as np
import pytest

from dynaip_jax.data.records import Dataset
from dynaip_jax.errors import UserError
from dynaip_jax.families.registry import open_bundle
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland import default
from dynaip_jax.shapeland.judge import init_judge
from dynaip_jax.storage.adapter import ADAPTER_WEIGHTS
from dynaip_jax.storage.manifest import flatten
from dynaip_jax.storage.tensors import read_tree
from train.shapeland import adapter, base, world
from train.shapeland.__main__ import main
from train.shapeland.judge import started_from
from train.shapeland.workdir import DONE


def test_going_on_starts_from_the_package(tmp_path):
    main(["--workdir", str(tmp_path), "--go-on", "--stages", "encoders"])
    assert json.loads((tmp_path / "encoders" / DONE).read_text())["seconds"] >= 0
    own = open_bundle(default.paths()[0])
    assert open_bundle(tmp_path / "encoders" / "bundle").manifest == own.manifest
    with pytest.raises(UserError, match="--stages vae: is kept with --go-on"):
        main(["--workdir", str(tmp_path), "--go-on", "--stages", "vae"])


def test_going_on_trains_base_and_adapter_together_and_then_the_adapter(tmp_path, monkeypatch):
    """Each starts from what the one before made, and the base stays as it is in the last."""
    for name, value in (("SCENES", 70), ("PAIRS", 70)):
        monkeypatch.setattr(world, name, value)
    for module in (base, adapter):
        monkeypatch.setattr(module, "MORE", 2)  # the rate begins at 0
    main(["--workdir", str(tmp_path), "--go-on", "--stages", "world", "encoders", "base", "adapter"])
    own, (root, joint, last) = (
        default.paths(),
        (tmp_path / name for name in ("base/bundle", "base/adapter", "adapter/adapter")),
    )
    for adapted in (joint, last):
        DynaIPPipeline.load(root, adapted)
    with pytest.raises(UserError, match="made for another base"):
        DynaIPPipeline.load(root, own[1])
    weights = [flatten(read_tree(path / ADAPTER_WEIGHTS)) for path in (own[1], joint, last)]
    for before, after in itertools.pairwise(weights):
        moved = [np.abs(before[name] - after[name]).max() for name in before]
        assert 0 < max(moved) < 0.1, "a step further"


def test_a_judge_goes_on_with_what_is_stored_of_its_form():
    fresh = init_judge(jax.random.key(0))
    older = {k: v for k, v in init_judge(jax.random.key(1)).items() if k != "parts"}
    started = flatten(started_from(fresh, older | dict(light=dict(kernel=np.zeros((2, 2))))))
    assert set(started) == set(flatten(fresh))
    for name, x in started.items():
        source = fresh if name.startswith(("parts.", "light.")) else older
        np.testing.assert_array_equal(x, flatten(source)[name])


def test_a_world_is_not_gone_on_with_under_other_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "SCENES", 12)
    monkeypatch.setattr(world, "PAIRS", 12)
    command = ["--workdir", str(tmp_path), "--stages", "world"]
    main([*command, "--describe-everything"])
    for records in ("scenes", "pairs"):
        dataset = Dataset(tmp_path / "world" / records)
        assert len(dataset) == 12 and all(
            " on " in dataset[n].caption and " at " in dataset[n].caption for n in range(12)
        )
    with pytest.raises(
        UserError,
        match="`describe_everything`: captions in .*world leave each part open with probability 0, expected 0.5",
    ):
        main(command)
    main([*command, "--describe-everything"])
