"""`evaluate` with the embedded model: it does what the method is for, and README says no more than is measured."""

import re
from pathlib import Path

import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland import default
from dynaip_jax.shapeland.measure import check, evaluate
from dynaip_jax.storage.tensors import read_tree

README = Path(__file__).parents[2] / "README.md"
LABELS = {"reference, DDS on (default)": "default", "text only": "text-only"}  # README's name of a row
CASES = 64  # of the published ones, from the first on


@pytest.fixture(scope="module")
def pipe():
    return DynaIPPipeline.load(*default.paths())


@pytest.fixture(scope="module")
def rows(pipe):
    measured = evaluate(pipe, read_tree(default.JUDGE), ["default", "text-only"], [1], num=CASES)
    return {each.name: each.row for each in measured}


def published():
    """README's rows of one subject: name -> measure -> (value, half width of its interval), and how many cases they are of."""
    text = README.read_text()
    header = re.search(r"^\| (\d+) cases.*CP.*PF.*\|$", text, re.MULTILINE)
    assert header, f"{README}: no table of CP and PF"
    number = r"(-?\d+\.\d+)"
    interval = rf"{number} \[{number}, {number}\]"
    rows = {}
    for label, *numbers in re.findall(rf"^\| ([^|]+) \| 1 \| {interval} \| {interval} \|", text, re.MULTILINE):
        cp, cp_low, cp_high, pf, pf_low, pf_high = map(float, numbers)
        if label in LABELS:
            rows[LABELS[label]] = dict(cp=(cp, (cp_high - cp_low) / 2), pf=(pf, (pf_high - pf_low) / 2))
    assert set(rows) == set(LABELS.values()), f"{README}: rows {sorted(rows)}"
    return rows, int(header[1])


@pytest.mark.parametrize("name", LABELS.values())
def test_readme_says_what_is_measured(rows, name):
    """Within the published 95 % interval, widened to so many cases (its width falls with the root of their number), and the two
    digits that README gives."""
    claims, cases = published()
    for measure, (value, half_width) in claims[name].items():
        tolerance = half_width * (cases / CASES) ** 0.5 + 0.005
        assert rows[name][measure] == pytest.approx(value, abs=tolerance), f"{measure} of {name}: README says {value}"


def test_the_reference_gives_the_identity_and_the_prompt_is_kept(rows):
    shown, told = rows["default"], rows["text-only"]
    assert shown["cp_ci"][0] > told["cp_ci"][1] and abs(told["cp"]) < 0.3
    assert min(shown["pf"], told["pf"]) > 0.9


def test_a_model_of_another_size_is_refused(pipe, monkeypatch):
    monkeypatch.setitem(pipe.bundle.manifest["defaults"], "width", 128)
    with pytest.raises(UserError, match="draws 128 x 64 pixels; expected a model of Shapeland, 64 x 64"):
        check(pipe.model, None, (1,))
