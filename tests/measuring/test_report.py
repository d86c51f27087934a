"""Scores and reports: means with paired intervals, worst first, every text escaped, whole or not at all."""

import html.parser
import re

import numpy as np
import pytest
from PIL import Image

from dynaip_jax.errors import UserError
from dynaip_jax.measuring import runs
from dynaip_jax.measuring.report import report
from dynaip_jax.measuring.scores import Row, Scores, check_comparable, means, read_scores, table, worst_first
from dynaip_jax.measuring.sets import Case, Subject

EVIL = '<script>alert("x")</script> & \'"><img src=http://example.org>'


def scores(values, fingerprint="f", column="CLIP-I, CLIP ViT-B/32", each=1):
    rows = [
        Row(f"{n // each:02}", n % each, f"pictures/{n}.png", {column: x}, {"CP": f"because {EVIL}"})
        for n, x in enumerate(values)
    ]
    return Scores(fingerprint, "own", dict(model="m", steps=None), rows)


@pytest.fixture
def run(tmp_path):
    """Three pictures, of which the second is missing, and a case each."""
    (tmp_path / "pictures").mkdir()
    for n, colour in enumerate(((255, 0, 0), None, (0, 0, 255))):
        if colour:
            Image.new("RGB", (400, 300), colour).save(tmp_path / "pictures" / f"{n}.png")
    reference = tmp_path / "ref.png"
    Image.new("RGB", (64, 64), (0, 255, 0)).save(reference)
    words = (EVIL, "cup", "")
    cases = [Case(f"{n:02}", f"{EVIL} {n}", (Subject((str(reference),), words[n]),)) for n in range(3)]
    return tmp_path, {case.name: case for case in cases}


def test_means_are_over_prompts_and_differences_paired():
    rng = np.random.default_rng(0)
    base, noise = rng.normal(0.5, 0.2, 80), rng.normal(0, 0.01, 80)
    own, other = scores(np.repeat(base, 2).round(6), each=2), scores(base - 0.02 + noise)
    (mean,) = means(own, other)
    assert mean.cases == 80 and mean.mean == pytest.approx(base.mean(), abs=1e-5)
    assert mean.difference == pytest.approx((0.02 - noise).mean(), abs=1e-5)
    low, high = mean.difference_interval
    assert 0.015 < low < mean.difference < high < 0.025, "paired: far narrower than the interval of the mean"
    assert mean.interval[1] - mean.interval[0] > 0.05
    assert re.search(r"CLIP-I, CLIP ViT-B/32 +80 +0\.\d{4} +\[.* \+0\.0\d{3} +\[0\.01", table([mean]))
    (alone,) = means(scores([0.5, None, 0.7]))
    assert alone.cases == 2 and alone.mean == pytest.approx(0.6)


def test_what_does_not_compare_is_refused(tmp_path):
    own = scores([0.1, 0.2])
    for other, message in (
        (scores([0.1, 0.2], fingerprint="g"), "another set"),
        (scores([0.1]), "1 pictures, this run has 2"),
        (
            scores([0.1, 0.2], column="CLIP-I, CLIP ViT-L/14"),
            "measured by CLIP-I, CLIP ViT-L/14, this run by CLIP-I, CLIP ViT-B/32",
        ),
    ):
        with pytest.raises(UserError, match=message):
            check_comparable(own, other, tmp_path)
    check_comparable(own, scores([0.3, 0.4]), tmp_path)
    with pytest.raises(UserError, match="missing; expected the scores of a run"):
        read_scores(tmp_path)
    (tmp_path / "scores.json").write_bytes(own.as_json())
    assert read_scores(tmp_path) == own
    for content, message in (
        (b"{}", "format"),
        (own.as_json().replace(b'"format": 1', b'"format": 2'), "format 2"),
        (b"[", "not readable"),
        (own.as_json().replace(b"pictures/0.png", b"../../x.png"), "in the folder of the run"),
    ):
        (tmp_path / "scores.json").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_scores(tmp_path)


def test_the_worst_come_first():
    rows = [
        Row(str(n), 0, "", dict(a=a, collapsed=c), {})
        for n, (a, c) in enumerate(((0.9, 0), (0.5, 1), (None, None), (0.9, 0.5)))
    ]
    assert [row.case for row in worst_first(rows, ["a", "collapsed"])] == ["1", "3", "0", "2"]


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.addresses = [], []

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]


def test_a_report_needs_no_other_file_and_runs_nothing(run):
    folder, cases = run
    own = scores([0.9, 0.2, 0.5])
    content = report(folder, own, cases, [f"note {EVIL}"], (folder / "<b>", scores([0.1, 0.1, 0.1]))).decode()
    tags = Tags()
    tags.feed(content)
    assert not {"script", "link", "iframe", "object"} & set(tags.found)
    assert tags.addresses and all(address.startswith("data:image/jpeg;base64,") for address in tags.addresses)
    assert "http://example.org" in content and "<script>" not in content and "&lt;script&gt;" in content
    assert content.count("background-image: url(data:image/jpeg") == 1, (
        "a reference that three prompts share is there once"
    )
    assert content.count('class="given r0"') == 3
    assert content.index("01, picture 0") < content.index("02, picture 0") < content.index("00, picture 0")
    assert re.search(r"this run, 01, picture 0: .*01|1\.png: no such file", content), "a missing picture is said so"
    assert 'class="better"' in content or 'class="alike"' in content


def test_a_full_disk_leaves_the_old_report(run, monkeypatch):
    folder, _ = run
    path = folder / "report.html"
    path.write_text("old")

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_new", full)
    with pytest.raises(UserError, match="No space left on device.*pictures and answers are kept"):
        runs.written(path, b"new")
    assert path.read_text() == "old"
