"""The trainer with the second family: a few steps, stopped and resumed, exported, and drawn with."""

import dataclasses
import json

import numpy as np
import pytest

from dynaip_jax.sampling.pipeline import DynaIPPipeline
from tests.train.runs import assert_same, fixed, losses, tiny_recipe
from train.export import export
from train.loop import train


@pytest.fixture(scope="module")
def recipe(tiny2, photographs):
    config = tiny_recipe(tiny2)
    data = dataclasses.replace(config.data, path=str(photographs), workers=0)
    return dataclasses.replace(config, data=data, log_every=1, save_every=2, batch=2)


def test_a_run_is_resumed_bit_for_bit_exported_and_draws(recipe, tiny2, tmp_path, photograph, dynaip):
    whole = train(dataclasses.replace(recipe, steps=4), tmp_path / "whole")
    train(dataclasses.replace(recipe, steps=2), tmp_path / "parts")
    train(dataclasses.replace(recipe, steps=4), tmp_path / "parts", resume=True)
    assert_same(tmp_path / "whole", tmp_path / "parts", 4)
    assert np.isfinite(losses(tmp_path / "whole")).all()

    export(tmp_path / "parts", tmp_path / "adapter", None, "last", "params")
    assert json.loads((tmp_path / "adapter/adapter.json").read_text())["base"]["family"] == "flux2"
    pipe = DynaIPPipeline.load(tiny2[0], tmp_path / "adapter")
    values = whole.params["adapter"]["double"]["value"]
    np.testing.assert_array_equal(pipe.adapter[1]["double"]["value"], values)
    assert np.abs(np.asarray(values)).max() > 0
    status, _, stderr = dynaip(
        "sample", "--model", tiny2[0], "--adapter", tmp_path / "adapter", "--prompt", "x", "--reference", photograph,
        "--steps", 1, "--height", 32, "--width", 32, "--output", tmp_path / "o.png",
    )  # fmt: skip
    assert status == 0, stderr


def test_one_batch_is_learned(recipe, tmp_path):
    train(fixed(recipe, steps=30, save_every=30, remat="full"), tmp_path / "run")
    seen = losses(tmp_path / "run")
    assert seen[-1] < 0.995 * seen[0]
