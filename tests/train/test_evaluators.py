"""Evaluators: when the loop calls them, and what the two shipped ones give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dynaip_jax import images
from dynaip_jax.families.registry import open_bundle
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from tests.train.runs import metrics
from train import assemble
from train.cache import cache
from train.config import SampleConfig, ValidationConfig
from train.evaluators import Due
from train.loop import train
from train.run import Run
from train.samples import Sampler
from train.validation import Validation


@pytest.fixture(scope="module")
def validated(config):
    path = config.data.path
    return dataclasses.replace(config, batch=2, steps=5, validation=ValidationConfig(path=path, every=2, batches=2))


def test_the_loop_calls_those_that_are_due_and_writes_what_they_return(config, tmp_path, monkeypatch):
    calls = []

    def evaluate(step, state):
        calls.append((step, int(state.step)))
        return dict(score=step / 2)

    monkeypatch.setattr(assemble, "shipped", lambda run: [Due(2, evaluate), Due(3, lambda step, state: {})])
    train(dataclasses.replace(config, batch=2, steps=5, log_every=4), tmp_path / "run")
    assert calls == [(2, 2), (4, 4)]
    lines = metrics(tmp_path / "run")
    assert [(line["step"], line.get("score"), "loss" in line) for line in lines] == [
        (2, 1.0, False), (4, None, True), (4, 2.0, False), (5, None, True),
    ]  # fmt: skip


def test_validation_is_written_and_leaves_training_alone(validated, tmp_path):
    seen = train(validated, tmp_path / "seen")
    values = {line["step"]: line["validation_loss"] for line in metrics(tmp_path / "seen") if "validation_loss" in line}
    assert set(values) == {2, 4} and all(np.isfinite(x) and x > 0 for x in values.values())
    plain = train(dataclasses.replace(validated, validation=ValidationConfig()), tmp_path / "plain")
    jax.tree.map(np.testing.assert_array_equal, seen, plain)


def test_validation_depends_on_the_averaged_weights_alone(validated):
    """Not on the step, nor on chance: drops, random granularity and fixed noise of training do not reach it."""
    run = Run(validated)
    state = run.fresh_state()
    validation = Validation(run)
    first = validation(2, state)
    assert validation(4, state._replace(params=jax.tree.map(lambda x: x + 1, state.params))) == first
    other = validation(2, state._replace(ema=jax.tree.map(lambda x: x + 0.3, state.ema)))
    assert abs(other["validation_loss"] - first["validation_loss"]) > 1e-3
    wild = dataclasses.replace(validated.data, drop_text=1.0, drop_image=0.0, drop_both=0.0, flip_target=1.0)
    changed = dataclasses.replace(validated, data=wild, random_granularity=1.0, fixed_noise=True)
    assert Validation(Run(changed))(2, state) == first


def test_validation_is_the_mean_over_its_batches(validated):
    one, two = (
        Validation(Run(dataclasses.replace(validated, validation=dataclasses.replace(validated.validation, batches=n))))
        for n in (1, 2)
    )
    state = Run(validated).fresh_state()
    first, both = (v(1, state)["validation_loss"] for v in (one, two))
    two._batches = two._batches[::-1]
    assert two(1, state)["validation_loss"] != pytest.approx(both, rel=1e-6)  # each batch has its own noise and times
    rows = [set(batch.row.tolist()) for batch in two._batches]
    assert len(rows[0] | rows[1]) == 4 and first != both


def test_a_cached_run_reads_the_encoders_for_its_evaluators_and_drops_them(validated, tmp_path):
    """Grid and loss are those of the run that encodes while it trains."""
    sample = SampleConfig(every=1, rows=3, size=32, steps=1)
    plain = dataclasses.replace(validated, sample=sample)
    cache(plain, tmp_path / "cache")
    cached = dataclasses.replace(plain, data=dataclasses.replace(plain.data, features=str(tmp_path / "cache")))
    values, grids = [], []
    for name, config in (("plain", plain), ("cached", cached)):
        with assemble.assembled(config, tmp_path / name) as run:
            state = run.fresh_state()
            sampler, validation = (due.evaluate for due in run.evaluators)
            sampler(1, state)
            values.append(validation(1, state)["validation_loss"])
            assert set(run.frozen) == ({"transformer"} if name == "cached" else {*run.encoders, "transformer"})
        grids.append(np.asarray(Image.open(tmp_path / name / "samples" / "step_000001.png")))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    np.testing.assert_array_equal(*grids)


def test_a_grid_has_guidance_where_the_model_asks_for_it(config, tmp_path):
    """Its pictures without an image prompt are those that the pipeline makes of the same noise."""
    bundle, prompts = open_bundle(config.bundle), ["a cat", "a cup"]
    bundle.manifest["defaults"]["true_cfg"] = 3.0
    sample = SampleConfig(every=1, prompts=tuple(prompts), size=32, steps=2)
    run = Run(dataclasses.replace(config, sample=sample), tmp_path, bundle=bundle)
    sampler = Sampler(run)
    drawn = sampler._pictures(run.fresh_state(), None)
    size = dict(height=32, width=32, steps=2, guidance=sample.guidance)
    guidance = dict(true_cfg=3.0, negative_prompt="")
    pipe = DynaIPPipeline.load(config.bundle)
    plain, guided = (pipe(prompts, noise=sampler._noise, **size, **how).images for how in ({}, guidance))
    np.testing.assert_allclose(images.to_uint8(drawn).astype(int), np.stack(guided), atol=1)
    assert np.abs(np.stack(plain).astype(int) - np.stack(guided)).max() > 3


def test_a_grid_of_samples_is_drawn_with_the_averaged_weights(config, tmp_path):
    sample = SampleConfig(every=1, prompts=("a cat", "a cup"), size=32, steps=1)
    with assemble.assembled(dataclasses.replace(config, sample=sample), tmp_path / "run") as run:
        state = run.fresh_state()
        sampler = Sampler(run)
        assert sampler(1, state) == {}
        sampler(2, state._replace(params=jax.tree.map(jnp.zeros_like, state.params)))
        sampler(3, state._replace(ema=jax.tree.map(lambda x: x + 0.5, state.ema)))
    one, two, three = (np.asarray(Image.open(tmp_path / f"run/samples/step_00000{n}.png")) for n in (1, 2, 3))
    assert one.shape == (2 * (128 + 16), 4 * 128, 3)  # a label above each cell
    assert (one == two).all() and (one != three).any()
    assert (one[:, :256] == three[:, :256]).all()  # reference and text only: no adapter in them
