"""`dynaip evaluate shapeland`: what it prints and what it refuses."""

import json
import re

import pytest

from dynaip_jax.shapeland import default, scoring
from dynaip_jax.storage.bundle import Bundle
from tests.shapeland.models import make_judge, make_model

KEYS = {"name", "subjects", "n", "cp", "pf", "cp_pf", "cp_ci", "pf_ci", "cp_pf_ci", "parts"}


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory):
    """Random weights of the judge."""
    return make_judge(tmp_path_factory.mktemp("judge") / "judge.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(bundle, adapter) of the embedded model, quick to sample from."""
    return make_model(tmp_path_factory.mktemp("shapeland"))


@pytest.fixture
def few(monkeypatch):
    """Fewer ground-truth renders to calibrate the judge on: quick, where its accuracy does not matter."""
    monkeypatch.setattr(scoring, "HELD_OUT", 128)


def test_json_and_anchors(dynaip, few, model, judge_file):
    names = ["default", "text-only", "reference-pasted", "true-render"]
    status, stdout, stderr = dynaip(
        "evaluate", "shapeland", "--model", model[0], "--adapter", model[1], "--judge", judge_file, "--json", "--num", 16,
        "--subjects", 1, "--rows", *names[:-1], "--against", names[-1],
    )  # fmt: skip
    assert status == 0, stderr
    found = json.loads(stdout)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == names
    for difference, name in zip(found["against"], names[:-1], strict=True):
        assert (difference["name"], difference["against"], difference["n"]) == (name, names[-1], 16)
        mean, low, high = difference["cp"]
        assert low <= mean <= high and mean == pytest.approx(rows[name]["cp"] - rows[names[-1]]["cp"], abs=2e-4)
    for row in rows.values():
        assert {"CP colours", "PF light", "leak background"} <= set(row["parts"])
        assert all(low <= mean <= high for mean, low, high in row["parts"].values())
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
    header, truth, variant, *_ = stdout[stdout.index("row ") :].splitlines()
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
    "against nothing": (
        "--model {bundle} --adapter {adapter} --judge {judge} --rows default --against nothing",
        "--rows nothing: no such row.*default, text-only",
    ),
    "against what cannot be": (
        "--model {bundle} --judge {judge} --against default",
        "--against default: no such row; expected some of text-only, reference-pasted, true-render",
    ),
    "four subjects": ("--subjects 4", "--subjects.*invalid choice: 4"),
    "no cases": ("--num 0", "--num 0: expected at least 1"),
    "too many cases": ("--num 1000000000", "--num 1000000000: expected at least 1, and at most"),
    "seed": ("--seed -1", "--seed -1: expected a number from 0"),
    "no weights": ("--model {bundle} --judge /nowhere", "/nowhere"),
    "no bundle": ("--model /nowhere --judge {judge}", "--model /nowhere"),
    "base without adapter": (
        "--model {bundle} --judge {judge} --rows default",
        "--rows default: needs an adapter.*--adapter DIR",
    ),
}


def test_bad_options_get_one_line(dynaip, model, judge_file, monkeypatch):
    monkeypatch.setattr(Bundle, "load", lambda *_, **__: pytest.fail("weights were read"))
    for name, (options, expected) in CASES.items():
        words = options.format(bundle=model[0], adapter=model[1], judge=judge_file).split()
        status, stdout, stderr = dynaip("evaluate", "shapeland", *words)
        assert status == 2 and stdout == "", name
        assert re.fullmatch(f"error: .*{expected}.*\n", stderr), f"{name}: {stderr}"
