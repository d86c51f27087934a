"""Stages of Shapeland's training, with `--go-on`."""

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
from dynaip_jax.storage.bundle import replace_component
from dynaip_jax.storage.manifest import flatten
from train.shapeland import world
from train.shapeland.__main__ import main
from train.shapeland.adapter import for_base
from train.shapeland.configs import FAMILY
from train.shapeland.judge import started_from
from train.shapeland.workdir import DONE, rounded


def test_going_on_starts_from_the_package(tmp_path):
    main(["--workdir", str(tmp_path), "--go-on", "--stages", "encoders"])
    assert json.loads((tmp_path / "encoders" / DONE).read_text())["seconds"] >= 0
    own = open_bundle(default.paths()[0])
    assert open_bundle(tmp_path / "encoders" / "bundle").manifest == own.manifest
    with pytest.raises(UserError, match="--stages vae: is kept with --go-on"):
        main(["--workdir", str(tmp_path), "--go-on", "--stages", "vae"])


def test_the_packages_adapter_is_taken_for_a_base_that_was_trained_further(tmp_path):
    bundle = open_bundle(default.paths()[0])
    weights = FAMILY.init_params("transformer", jax.random.key(7))
    replace_component(bundle, tmp_path / "bundle", "transformer", rounded(weights), {})
    with pytest.raises(UserError, match="made for another base"):
        DynaIPPipeline.load(tmp_path / "bundle", default.paths()[1])
    for_base(tmp_path / "adapter", tmp_path / "bundle")
    DynaIPPipeline.load(tmp_path / "bundle", tmp_path / "adapter")
    first, own = (path / ADAPTER_WEIGHTS for path in (tmp_path / "adapter", default.paths()[1]))
    assert first.read_bytes() == own.read_bytes()


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
