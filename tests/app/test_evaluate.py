"""`dynaip evaluate shapeland`: what its numbers mean, that they are of the pipeline's own pictures, and what it prints."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dynaip_jax.flow import ScheduleConfig
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland import default
from dynaip_jax.shapeland import measure as shapeland
from dynaip_jax.shapeland import world as synthetic
from dynaip_jax.shapeland.judge import Verdict, init_judge
from dynaip_jax.shapeland.world import BACKGROUNDS, CLASSES
from dynaip_jax.storage.bundle import NewComponent, write_bundle
from dynaip_jax.storage.codec import to_dict
from dynaip_jax.storage.manifest import flatten
from dynaip_jax.storage.tensors import read_tree
from dynaip_jax.testing import make_adapter
from train.shapeland.stages import CONFIGS, FAMILY, TOKENS, write_tokenizers

KEYS = {"name", "subjects", "n", "cp", "pf", "cp_pf", "cp_ci", "pf_ci", "cp_pf_ci"}


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory):
    """Random weights of the judge."""
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    save_file({k: np.asarray(v) for k, v in flatten(init_judge(jax.random.key(0))).items()}, path)
    return path


@pytest.fixture(scope="module")
def judge(judge_file):
    return read_tree(judge_file)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(bundle, adapter) of Shapeland's own sizes and words, with random weights."""
    folder = tmp_path_factory.mktemp("shapeland")

    def components():
        for name, config in CONFIGS.items():
            params = jax.tree.map(np.asarray, FAMILY.init_params(name, jax.random.key(0)))
            yield NewComponent(name, to_dict(config), params, [dict(made_from="seed 0")])

    write_bundle(
        folder / "bundle", components(), family="flux", schedule=to_dict(ScheduleConfig()), text=TOKENS,
        defaults=dict(steps=4, true_cfg=2.0, height=64, width=64), tokenizers=write_tokenizers(folder / "words"),
    )  # fmt: skip
    make_adapter(folder / "adapter", folder / "bundle")
    return folder / "bundle", folder / "adapter"


@pytest.fixture(scope="module")
def pipe(model):
    return DynaIPPipeline.load(*model)


@pytest.fixture
def few(monkeypatch):
    """Fewer true renders to calibrate the judge on: quick, and good enough where it is not the matter."""
    monkeypatch.setattr(shapeland, "HELD_OUT", 128)


@pytest.mark.parametrize("subjects", (1, 3))
def test_an_untrained_judge_is_doubted_and_cases_are_those_of_their_seed(judge, subjects):
    known = shapeland.calibrate(judge, subjects)
    cases = shapeland.make_cases(subjects, seed=5, num=24)
    cp, pf = shapeland.scores(judge, cases.renders, cases, known)
    assert cp.shape == pf.shape == (24,) and np.isfinite(cp).all() and ((pf >= 0) & (pf <= 1)).all()
    again = shapeland.make_cases(subjects, seed=5, num=4)
    np.testing.assert_array_equal(again.reposed, cases.reposed[:4])
    assert shapeland.doubts({subjects: known})  # it cannot tell classes, and says so


def test_scores_are_what_the_verdict_says(monkeypatch):
    """A verdict made by hand: of two subjects one is there but in the wrong column, the background is right, the number wrong."""
    cases = shapeland.make_cases(2, seed=5, num=1)
    asked = shapeland.truth(cases.scenes)
    first, second = np.flatnonzero(asked.position[0] >= 0)
    present = np.full((1, len(CLASSES)), -1.0)
    present[0, first] = 1
    position = np.zeros((1, len(CLASSES), 3))
    position[0, first, (asked.position[0, first] + 1) % 3] = 1
    background = np.eye(len(BACKGROUNDS))[asked.background]
    identity = np.zeros((1, len(CLASSES), 2))
    identity[0, first], identity[0, second] = (1, 0), (0, 1)
    seen = Verdict(present, position, background, np.eye(4)[[3]], identity)
    target = seen._replace(identity=np.broadcast_to([1.0, 0.0], identity.shape))
    verdicts = iter([seen, target])
    monkeypatch.setattr(shapeland, "read", lambda *_: next(verdicts))
    cp, pf = shapeland.scores(None, cases.renders, cases, shapeland.Calibration(same=0.9, other=0.1, accuracy={}))
    assert pf[0] == pytest.approx(2 / 6)  # a class and the background
    assert cp[0] == pytest.approx((0.5 - 0.1) / 0.8)


@pytest.mark.parametrize(("row", "batch"), (("default", 2), ("regions-given", 1)))
def test_pictures_are_the_pipelines(pipe, row, batch, monkeypatch):
    """Case by case what `DynaIPPipeline` draws, though sampled in batches, the last of them filled up."""
    monkeypatch.setattr(shapeland, "BATCH", batch)
    monkeypatch.setitem(pipe.defaults, "steps", 4)
    cases = shapeland.make_cases(2, seed=3, num=3)
    batched = shapeland.draw(pipe, cases, shapeland.ROWS[row], seed=3)
    vae = pipe.configs["vae"]
    noise = shapeland._noise(3, np.arange(3), (vae.z_channels, 64 // vae.downsample, 64 // vae.downsample))
    for n, scene in enumerate(cases.scenes):
        words, masks = [s.kind for s in scene.subjects], shapeland._grown(cases.masks[n])
        options = dict(words=words) if row == "default" else dict(masks=masks)
        alone = pipe(synthetic.caption(scene), list(cases.references[n]), noise=np.asarray(noise[n : n + 1]), **options)
        difference = np.abs(np.asarray(alone.images[0]).astype(int) - batched[n])
        assert difference.max() <= 2, f"case {n}: pixels differ by up to {difference.max()}"


def test_json_and_anchors(dynaip, few, model, judge_file):
    names = ["default", "text-only", "reference-pasted", "true-render"]
    status, stdout, stderr = dynaip(
        "evaluate", "shapeland", "--model", model[0], "--adapter", model[1], "--judge", judge_file, "--json", "--num", 16,
        "--subjects", 1, "--rows", *names,
    )  # fmt: skip
    assert status == 0, stderr
    rows = {row["name"]: row for row in json.loads(stdout)["rows"]}
    assert list(rows) == names
    for row in rows.values():
        assert set(row) == KEYS and row["subjects"] == 1 and row["n"] == 16
        for value, interval in (("cp", "cp_ci"), ("pf", "pf_ci"), ("cp_pf", "cp_pf_ci")):
            assert row[interval][0] <= row[value] <= row[interval][1]
    assert len({row["cp"] for row in rows.values()}) == len(names)


def test_table_and_stored_rows(dynaip, few, model, judge_file, tmp_path, monkeypatch):
    stored = dict(
        name="token router", asks="one weight a token", subjects=2, n=256, seed=0, steps=1000, cp=0.5, pf=0.75, cp_pf=0.4,
        cp_ci=[0.4, 0.6], pf_ci=[0.7, 0.8], cp_pf_ci=[0.3, 0.5],
    )  # fmt: skip
    monkeypatch.setattr(default, "ASSETS", model[0].parent)
    monkeypatch.setattr(default, "RETRAINED", tmp_path / "retrained.json")
    default.RETRAINED.write_text(json.dumps(dict(rows=[stored, stored | dict(subjects=3)])))
    command = ("evaluate", "shapeland", "--judge", judge_file, "--num", 4, "--subjects", 2, "--rows")
    status, stdout, _ = dynaip(*command, "true-render", "token router")
    assert status == 0
    *_, header, truth, variant = stdout.splitlines()
    assert re.match(r"true-render   2         4      -?\d\.\d{3} +\[", truth), truth
    assert " ".join(variant.split()) == (
        "token router 2 256 0.500 [0.400, 0.600] 0.750 [0.700, 0.800] 0.400 [0.300, 0.500] one weight a token"
    )
    assert header.index("CP·PF") == variant.index("0.400 ")
    status, _, stderr = dynaip(*command, "token router", "--adapter", model[1])  # another adapter has no such rows
    assert status == 2 and "--rows token router: no such row" in stderr


CASES = {
    "no row": (
        "--model {bundle} --adapter {adapter} --judge {judge} --rows nothing",
        "--rows nothing: no such row.*default, text-only",
    ),
    "row of several": (
        "--model {bundle} --adapter {adapter} --judge {judge} --rows concat --subjects 1",
        "--rows concat: is about 2 or 3 subjects, --subjects 1",
    ),
    "four subjects": ("--subjects 4", "--subjects.*invalid choice: 4"),
    "no cases": ("--num 0", "--num 0: expected at least 1"),
    "seed": ("--seed -1", "--seed -1: expected a number from 0"),
    "no weights": ("--model {bundle} --judge /nowhere", "/nowhere"),
    "no bundle": ("--model /nowhere --judge {judge}", "--model /nowhere"),
    "base without adapter": (
        "--model {bundle} --judge {judge} --rows default",
        "--rows default: needs an adapter.*--adapter DIR",
    ),
}


def test_bad_options_get_one_line(dynaip, model, judge_file):
    for name, (options, expected) in CASES.items():
        words = options.format(bundle=model[0], adapter=model[1], judge=judge_file).split()
        status, stdout, stderr = dynaip("evaluate", "shapeland", *words)
        assert status == 2 and stdout == "", name
        assert re.fullmatch(f"error: .*{expected}.*\n", stderr), f"{name}: {stderr}"


def test_a_model_of_another_size_is_refused(pipe, monkeypatch):
    monkeypatch.setitem(pipe.defaults, "width", 128)
    with pytest.raises(shapeland.UserError, match="draws 128 x 64 pixels; expected a model of Shapeland, 64 x 64"):
        shapeland.check(pipe, None, (1,))
