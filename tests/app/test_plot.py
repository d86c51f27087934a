"""`dynaip plot`: curves of runs, their values beside them, and what is wrong with what it is given."""

import csv
import json

import numpy as np
import pytest

from dynaip_jax import images
from dynaip_jax.eval import curves


def write_run(folder, losses, start=1, **more):
    """A workdir whose metrics are as the trainer writes them: a line a step, and one of its own for a validation."""
    folder.mkdir(parents=True)
    lines = [dict(step=step, loss=loss, mfu=None) | more for step, loss in enumerate(losses, start)]
    lines.insert(2, dict(step=start + 1, validation_loss=0.5))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def two(tmp_path):
    return write_run(tmp_path / "a" / "run", [3.0, 2.0, 1.0, 0.5]), write_run(
        tmp_path / "b" / "run", [4.0, 1.0], start=9
    )


def test_values_lie_beside_the_figure(dynaip, two, tmp_path):
    status, out, err = dynaip("plot", *two, "--output", tmp_path / "c.png")
    assert (status, out.split(), err) == (0, [str(tmp_path / "c.png"), str(tmp_path / "c.csv")], "")
    rows = list(csv.reader((tmp_path / "c.csv").open()))
    assert rows[0] == ["run", "metric", "step", "value"]
    assert rows[1:5] == [["a/run", "loss", str(n), str(x)] for n, x in ((1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5))]
    assert rows[5:] == [["a/run", "validation_loss", "2", "0.5"], ["b/run", "loss", "9", "4.0"], ["b/run", "loss", "10", "1.0"],
                        ["b/run", "validation_loss", "10", "0.5"]]  # fmt: skip
    assert images.read_settings(tmp_path / "c.png")["runs"] == [str(path) for path in two]


def test_a_line_a_run_is_drawn(two):
    """Each in a color of its own: C0 and C1 of matplotlib."""
    runs = {str(path): curves.read_curves(path)[0] for path in two}
    drawn = [
        np.asarray(curves.figure(dict(chosen), ["loss"])).reshape(-1, 3)
        for chosen in (runs.items(), [*runs.items()][:1])
    ]
    first, second = np.array([31, 119, 180]), np.array([255, 127, 14])
    assert [(pixels == color).all(1).sum() > 50 for pixels in drawn for color in (first, second)] == [
        True,
        True,
        True,
        False,
    ]


def test_the_running_mean():
    curve = curves.Curve(np.arange(4), np.array([4.0, 2.0, 0.0, 8.0]))
    assert curves.smoothed(curve, 2).values.tolist() == [3, 1, 4, 8]
    assert curves.smoothed(curve, 3) is curve
    six = curves.Curve(np.arange(6), np.array([4.0, 2.0, 0.0, 8.0, 1.0, 0.0]))
    assert curves.smoothed(six, 3).values.tolist() == [3, 2, 10 / 3, 3, 3, 0.5]
    assert curves.smoothed(curve, 1).values.tolist() == curve.values.tolist()


def test_damaged_lines_are_told_of_and_a_half_written_one_is_not(dynaip, two, tmp_path):
    file = two[0] / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[0], lines[3] = "[" * 3000, '{"step": "x"}'
    file.write_text("\n".join([*lines, '{"step": 9, "lo']))
    status, _, err = dynaip("plot", two[0], "--output", tmp_path / "c.png", "--metrics", "loss")
    assert status == 0 and err == f"warning: {two[0]}: 2 lines of metrics cannot be read, the first is 1\n"
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 1 + 2


def test_a_run_in_a_bucket(dynaip, bucket, tmp_path, two):
    from etils import epath

    (epath.Path(bucket) / "run" / "metrics.jsonl").write_bytes((two[0] / "metrics.jsonl").read_bytes())
    assert dynaip("plot", f"{bucket}/run", "--output", tmp_path / "c.png")[0] == 0
    assert "run,loss,1,3.0" in (tmp_path / "c.csv").read_text()


@pytest.mark.parametrize(
    "words, found",
    [
        (["nowhere"], "RUN nowhere: its metrics.jsonl cannot be read (No such file or directory); expected the workdir of a training run"),
        (["a/run", "a/run/"], "RUN a/run/: given twice; expected different runs"),
        (["a/run", "--metrics", "los"], "--metrics los: in none of these runs; expected some of loss, validation_loss"),
        (["a/run", "--smooth", 0], "--smooth 0: expected at least 1"),
        (["a/run", "--output", "c.jpg"], "c.jpg: output name ends in '.jpg'; expected .png"),
        (["empty"], "no line holds a number by its step"),
        ([], "RUN"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_leaves_nothing(dynaip, two, tmp_path, monkeypatch, words, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("{}\n")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = dynaip("plot", *words)
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and found in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_replaced_unasked(dynaip, two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "curves.csv").write_text("mine")
    status, _, err = dynaip("plot", two[0])
    assert status == 2 and "curves.csv: exists; expected a free name for the values; pass --overwrite" in err
    assert (tmp_path / "curves.csv").read_text() == "mine" and not (tmp_path / "curves.png").exists()
    assert dynaip("plot", two[0], "--overwrite")[0] == 0 and (tmp_path / "curves.csv").read_text() != "mine"
