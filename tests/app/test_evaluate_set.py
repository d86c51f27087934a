"""`dynaip evaluate set`, on the example of the repository: drawn, measured, judged, reported, compared, stopped and gone on with."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dynaip_jax.jobs import running
from dynaip_jax.measuring import client, runs
from dynaip_jax.measuring.scores import read_scores
from dynaip_jax.storage.locks import hold
from dynaip_jax.testing import make_dino
from tests.measuring.fake_judge import serving
from tests.shapeland.models import make_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "evaluate" / "set.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(bundle, adapter) of the embedded model, quick to sample from, and a DINO."""
    folder = tmp_path_factory.mktemp("models")
    make_dino(folder / "dino", image_size=224, patch_size=32)
    return *make_model(folder), folder / "dino"


@pytest.fixture
def evaluate(dynaip, model, tmp_path):
    def run(*words, set=EXAMPLE, out="run", measures=("--dino", model[2])):
        return dynaip(
            "evaluate", "set", set, "--model", model[0], "--adapter", model[1], "--out", tmp_path / out, *measures, *words
        )  # fmt: skip

    return run


def test_the_example_stopped_anywhere_and_compared(evaluate, tmp_path, monkeypatch):
    save, put = running.images.save_png, client.Cache.put
    stops = {"picture": 3, "answer": 5}
    counts = {"picture": 0, "answer": 0}

    class Killed(BaseException):
        pass

    def stopping(name, function):
        def run(*args, **kwargs):
            if stops.get(name) == counts[name]:
                del stops[name]
                raise Killed
            counts[name] += 1
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(running.images, "save_png", stopping("picture", save))
    monkeypatch.setattr(client.Cache, "put", stopping("answer", put))
    with serving(4, 3, 2, 1) as (fake, url):
        judge = ("--judge-url", url, "--judge-model", "eye", "--judge-at-once", 1, "--num-images", 2)
        status, stdout, stderr = evaluate("--dry-run", "--judge-price", 2.5, 10, *judge)
        assert status == 0 and stdout == "" and not fake.seen, stderr
        assert "6 pictures, 6 of them to be drawn" in stderr
        assert re.search(
            r"14 questions, 0 of them answered; about \d+ tokens in and 840 out for the rest, about 0.0\d", stderr
        )
        for _ in range(2):
            with pytest.raises(Killed):
                evaluate(*judge)
        status, stdout, stderr = evaluate(*judge)
        assert status == 0, stderr
        assert len(fake.seen) == 15, "one answer was lost by the kill, none is asked for twice"
        assert counts == {"picture": 6, "answer": 14}
        scored = read_scores(tmp_path / "run")
        assert scored.columns == ["DINO-I, DINO ViT-32/32", "CP, eye", "PF, eye", "CP·PF, eye", "collapsed"]
        assert [row.file for row in scored.rows] == [
            f"pictures/{n}_{k}.png" for n in ("star", "fish", "both") for k in (0, 1)
        ]
        assert all(-1 <= row.scores["DINO-I, DINO ViT-32/32"] <= 1 for row in scored.rows)
        assert {row.scores["collapsed"] for row in scored.rows[4:]} <= {0, 0.5, 1}
        assert stdout.splitlines()[-1] == str(tmp_path / "run" / "report.html")
        whole = {
            p.name: p.read_bytes() for p in (tmp_path / "run").rglob("*.*") if p.is_file() and p.suffix != ".jsonl"
        }
        status, _, stderr = evaluate(*judge)
        assert status == 0 and "6 pictures, 0 of them to be drawn" in stderr and len(fake.seen) == 15
        shutil.rmtree(tmp_path / "run" / "pictures")
        assert evaluate(*judge)[0] == 0 and len(fake.seen) == 15, "drawn again to the same bytes, so judged already"
    assert whole == {
        p.name: p.read_bytes() for p in (tmp_path / "run").rglob("*.*") if p.is_file() and p.suffix != ".jsonl"
    }
    status, stdout, stderr = evaluate("--num-images", 2, "--image-scale", 0, "--against", tmp_path / "run", out="other")
    assert status == 0, stderr
    assert re.search(r"DINO-I, DINO ViT-32/32 +3 +-?0\.\d+ +\[.*\] +-?0\.\d+ +[+-]0\.\d+ +\[", stdout), stdout
    status, _, stderr = evaluate("--num-images", 1, "--against", tmp_path / "run", out="third")
    assert status == 2 and "expected the same --num-images and --limit" in stderr
    assert not (tmp_path / "third").exists(), "said before anything is drawn"


def test_bad_input_is_one_line(evaluate, tmp_path, model):
    path = tmp_path / "set.jsonl"
    shutil.copy(EXAMPLE.parent / "fish.png", tmp_path / "fish.png")
    good = dict(prompt="a fish on sand at noon", references=["fish.png"])
    for row, words, message in (
        (dict(good, references=["none.png"]), (), "line 1: .*none.png: no such file"),
        (dict(good, references=["set.jsonl"]), (), r"0000 \(1 pictures cannot be drawn\): .*not a picture"),
        (good, ("--judge-url", "http://localhost:1/v1"), "--judge-model: missing"),
        (good, ("--judge-url", "here", "--judge-model", "eye"), "--judge-url here: no address"),
        (good, ("--judge-repeats", 0), "--judge-repeats 0: expected at least 1"),
        (good, ("--judge-price", 3), "--judge-price: expected two prices"),
        (good, ("--limit", 0), "--limit 0: expected at least 1"),
        (good, ("--height", 33), "height 33: expected a positive multiple"),
        (good, ("--against", tmp_path / "nothing"), "scores.json: missing; expected the scores of a run"),
    ):
        path.write_text(json.dumps(row))
        status, stdout, stderr = evaluate(*words, set=path)
        assert status == 2 and stdout == "" and re.search(f"error: .*{message}", stderr), (words, stderr)
    status, _, stderr = evaluate(set=path, measures=("--dino", model[0]))
    assert status == 2 and "unknown family 'flux'" in stderr

    def refusal(holder):
        return AssertionError(holder)

    (tmp_path / "run").mkdir()
    with hold(tmp_path / "run" / runs.LOCK, refusal):
        status, _, stderr = evaluate(set=path)
    assert status == 2 and "evaluates there; expected a folder of its own" in stderr
