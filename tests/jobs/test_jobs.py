"""Lists of generations: what fails is told by its line, the rest is drawn by one program a shape, and a list that was stopped at any
moment ends with the bytes of one that was not."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynaip_jax.errors import OutOfMemory
from dynaip_jax.images.files import read_settings
from dynaip_jax.jobs import running
from dynaip_jax.jobs.planning import make_plan
from dynaip_jax.jobs.rows import read_jobs
from dynaip_jax.runtime.layouts import Arranged
from dynaip_jax.sampling import batches
from dynaip_jax.sampling.opening import open_model
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.storage.locks import hold

SMALL = ("--steps", 2, "--height", 32, "--width", 32)


@pytest.fixture(scope="module")
def lines(photograph, tmp_path_factory):
    """Two shapes with a reference, one of them with two settings that share no batch; several pictures; none; two subjects."""
    folder = tmp_path_factory.mktemp("jobs")
    shutil.copy(photograph, folder / "cup.jpg")
    return folder, [
        dict(prompt="a cup", references="cup.jpg", output="{prompt}_{seed}.png", seed=3),
        dict(prompt="a cup", output="plain.png", image_end=1.0),
        dict(prompt=["a cup", "a mug"], references=["cup.jpg"], output="many.png", num_images=2, image_scale=0.5),
        dict(prompt="a mug", references=["cup.jpg"], output="late.png", image_start=0.5, granularity=[0, 1, 1]),
        dict(
            prompt="a cup and a red star",
            references=["cup.jpg", "cup.jpg"],
            words=["cup", "red star"],
            output="two.png",
        ),
    ]


def write(folder, rows):
    path = folder / "jobs.jsonl"
    path.write_text("\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture
def draw(dynaip, tiny, lines, tmp_path):
    """Draws the list in a folder of its own -> (exit status, stdout, stderr)."""

    def run(*words, name="run", rows=lines[1], model=tiny):
        folder = tmp_path / name
        shutil.copytree(lines[0], folder, dirs_exist_ok=True)
        return dynaip(
            "sample", "--model", model[0], "--adapter", model[1], "--jobs", write(folder, rows), *SMALL, *words
        )

    return run


def test_all_lines_are_drawn_by_one_program_a_shape(draw, dynaip, tiny, tmp_path, monkeypatch):
    compiled, news = [], Arranged.news
    monkeypatch.setattr(Arranged, "news", lambda self, facts: compiled.append(news(self, facts)) or compiled[-1])
    status, stdout, stderr = draw()
    assert status == 0, stderr
    names = {"a_cup_3.png", "plain.png", "late.png", "two.png", "many.png", *(f"many_{k}.png" for k in range(4))}
    assert set(contents(tmp_path / "run")) == names and len(stdout.split()) == len(names)
    assert sum(what is not None for what in compiled) == 3, "one reference, none, two with words"
    settings = read_settings(tmp_path / "run" / "many_3.png")
    assert settings["prompt"] == "a mug" and settings["seed"] == 1 and settings["image_scale"] == 0.5
    assert read_settings(tmp_path / "run" / "plain.png")["adapter"] is None
    grid, first = (read_settings(tmp_path / "run" / name) for name in ("many.png", "many_0.png"))
    assert grid["routing"] == first["routing"] and grid["seed"] == [0, 1] * 2
    again = draw()
    assert again[:2] == (0, "") and "8 of 8 pictures are there already" in again[2]
    for name in ("two",):  # the same as dynaip sample draws each
        old, new = (tmp_path / folder / f"{name}.png" for folder in ("run", "."))
        status, _, stderr = dynaip("sample", "--like", old, "--output", new)
        assert status == 0, stderr
        difference = np.asarray(Image.open(old), int) - np.asarray(Image.open(new), int)
        assert np.abs(difference).max() <= 1, name
        assert read_settings(old).keys() == read_settings(new).keys(), name


def test_one_process_draws_a_list(draw, tmp_path):
    (tmp_path / "run").mkdir()
    busy = lambda holder: AssertionError(holder)
    with hold(tmp_path / "run" / ".jobs.jsonl.lock", busy):
        status, stdout, stderr = draw()
    assert status == 2 and stdout == "" and f"process {os.getpid()} on" in stderr and "draws it; expected" in stderr
    (tmp_path / "run" / ".jobs.jsonl.lock").write_text("left by a kill")
    rows = [dict(prompt="a cup", output="plain.png")]
    assert draw(rows=rows)[0] == 0 and not (tmp_path / "run" / ".jobs.jsonl.lock").exists()


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def pipe(tiny):
    """(opened model, pipeline)"""
    opened = open_model(*tiny)
    return opened, DynaIPPipeline.read(opened)


@pytest.fixture
def planned(pipe, lines):
    """The plan of a list where it lies."""

    def plan(rows):
        return make_plan(pipe[0], read_jobs(write(lines[0], rows), dict(steps=2, height=32, width=32))[0], False)

    return plan


@pytest.fixture
def drawing(pipe, lines, planned):
    """Draws a list where it lies, without the command; `meanwhile`: what happens once it is planned; `failed`: lines that then fail."""

    def run(rows=lines[1], meanwhile=lambda: None, failed=(), **options):
        plan = planned(rows)
        meanwhile()
        made = running.Drawing(pipe[0], plan, **options)
        made._pipe = pipe[1]
        assert sorted(made.run()) == list(failed)

    yield run
    for picture in lines[0].glob("*.png"):
        picture.unlink()


def test_a_list_stopped_at_any_moment_ends_with_the_same_bytes(drawing, lines, monkeypatch):
    drawing()
    whole, save, saved = contents(lines[0]), running.images.save_png, []
    for name in whole:
        (lines[0] / name).unlink()
    stops = [(n, late) for n in range(len(whole)) for late in (False, True)]

    def stopping(image, path, settings, *, overwrite):
        stop = stops[0] if stops else None
        if stop == (len(saved), False):
            raise Killed
        save(image, path, settings, overwrite=overwrite)
        saved.append(path)
        if stop == (len(saved) - 1, True):
            raise Killed

    monkeypatch.setattr(running.images, "save_png", stopping)
    while stops:
        with pytest.raises(Killed):
            drawing()
        stops.pop(0)
    drawing()
    assert contents(lines[0]) == whole
    assert len(saved) == len(set(saved)) == len(whole), "no picture is drawn twice"
    told: list[Path] = []
    (lines[0] / "many_1.png").unlink()
    drawing(told=told.append)
    assert [path.name for path in told] == ["many_1.png"] and contents(lines[0]) == whole


def test_pictures_that_another_process_makes_meanwhile_are_kept(drawing, lines):
    drawing()
    whole = contents(lines[0])
    for name in whole:
        (lines[0] / name).unlink()
    drawing(meanwhile=lambda: [(lines[0] / name).write_bytes(data) for name, data in whole.items()])
    assert contents(lines[0]) == whole


def test_lines_of_one_shape_keep_their_own_words_and_times(drawing, lines):
    Image.new("RGB", (64, 64), "red").save(lines[0] / "red.jpg")
    one, two = (
        dict(prompt="a cup", references="cup.jpg"),
        dict(references=["cup.jpg", "red.jpg"], words=["cup", "red star"]),
    )
    rows = [
        one | dict(output="whole.png"),
        one | dict(output="end.png", image_end=0.5),
        *(
            one | dict(output=f"not_{n}.png", true_cfg=4.0, negative_prompt=text)
            for n, text in enumerate(("a mug", "grass"))
        ),
        two | dict(output="two.png", prompt=["a cup and a red star", "a red star beside a cup"]),
    ]

    def pixels(names):
        return {name: np.asarray(Image.open(lines[0] / f"{name}.png"), int) for name in names}

    drawing(rows, at_once=2)
    together = pixels(["whole", "end", "not_0", "not_1", "two_0", "two_1"])
    for picture in lines[0].glob("*.png"):
        picture.unlink()
    drawing(rows[:-1], at_once=1)
    drawing([two | dict(output=f"two_{n}.png", prompt=text) for n, text in enumerate(rows[-1]["prompt"])], at_once=1)
    for name, alone in pixels(together).items():
        assert np.abs(alone - together[name]).max() <= 1, name


def test_a_picture_is_a_lines_own_only_with_all_its_settings(drawing, planned, lines):
    row = dict(prompt="a cup", references="cup.jpg", output="own.png")
    drawing([row])
    shutil.copy(lines[0] / "cup.jpg", lines[0] / "same.jpg")
    with Image.open(lines[0] / "cup.jpg") as picture:
        picture.rotate(180).save(lines[0] / "turned.jpg")

    def failures(**changes):
        return [str(e) for e in planned([row | changes]).failures.values()]

    assert failures() == failures(references="same.jpg") == []
    for changes in (
        dict(image_scale=0.5), dict(text_gain=1.0), dict(granularity=[1, 0, 0]), dict(steps=3), dict(references="turned.jpg"),
        dict(num_images=2),  # whose grid it would be
    ):  # fmt: skip
        (told,) = failures(**changes)
        assert "was not made by this line" in told, changes


def test_a_reference_that_goes_meanwhile_fails_its_line_and_no_other(drawing, lines):
    gone = lines[0] / "gone.jpg"
    shutil.copy(lines[0] / "cup.jpg", gone)
    rows = [dict(prompt="a cup", references="gone.jpg", output="lost.png", num_images=2), *lines[1][:2]]
    drawing(rows, meanwhile=gone.unlink, failed=[1])
    assert set(contents(lines[0])) == {"a_cup_3.png", "plain.png"}


def test_too_little_memory_draws_fewer_at_once(drawing, monkeypatch):
    sizes, together = [], batches.draw_together

    def limited(pipe, asked):
        sizes.append(len(asked))
        if len(asked) > 1:
            raise OutOfMemory("2 GiB")
        return together(pipe, asked)

    monkeypatch.setattr(running, "draw_together", limited)
    drawing(at_once=3)
    assert sizes == [3, *[1] * 8]


def test_lines_that_fail_are_told_and_the_rest_is_done(draw, lines, tmp_path):
    rows = [
        "{",
        dict(prompt="a cup", output="plain.png"),
        dict(prompt="a cup", output="plain.png"),
        dict(prompt="a cup", output="a.png", stesp=3),
        dict(prompt="a cup", output="a.png", model="x"),
        dict(prompt="a cup", output="a.png", height=33),
        dict(prompt="a cup", output="a.png", references="no.jpg"),
        dict(prompt="a cup", output="{time}.png"),
        dict(prompt="a cup"),
        dict(prompt="a cup", output="no/a.png"),
        dict(prompt="a cup", output="taken.png"),
        "7",
        dict(prompt="a cup", output="a.png", noise_row=1),
    ]
    (tmp_path / "run").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "run" / "taken.png")
    status, stdout, stderr = draw(rows=rows)
    assert status == 2 and stdout.split() == [str(tmp_path / "run" / "plain.png")]
    numbered = {int(line.split(":")[0][5:]): line for line in stderr.splitlines() if line.startswith("line ")}
    words = [
        "not JSON", None, "line 3 writes it too", "stesp: no option of a line", "model: no option of a line; model, adapter",
        "height 33: expected a positive multiple", "no.jpg: no such file", "{time} would be another name", "output: missing",
        "there is no folder", "was not made by this line", "a JSON int", "beside noise FILE.npy",
    ]  # fmt: skip
    assert set(numbered) == {2 * n + 1 for n, word in enumerate(words) if word}
    for n, word in enumerate(words):
        assert word is None or word in numbered[2 * n + 1], numbered[2 * n + 1]
    assert "12 of 13 lines failed, the first is line 1" in stderr.splitlines()[-1]
    status, _, stderr = draw("--overwrite", rows=rows[10:11])
    assert status == 0 and Image.open(tmp_path / "run" / "taken.png").size == (32, 32), stderr


def test_what_lines_say_is_not_asked_of_the_command(dynaip, tmp_path):
    for words, name in (
        (("--prompt", "a cup"), "prompt"),
        (("--output", "a.png"), "output"),
        (("--random-seed",), "random-seed"),
    ):
        status, _, stderr = dynaip("sample", "--jobs", tmp_path / "jobs.jsonl", *words)
        assert status == 2 and f"--{name}: each line of --jobs says its own" in stderr, stderr
    for content, message in ((None, "cannot be read"), ("", "holds no line")):
        if content is not None:
            (tmp_path / "jobs.jsonl").write_text(content)
        status, _, stderr = dynaip("sample", "--jobs", tmp_path / "jobs.jsonl")
        assert status == 2 and message in stderr, stderr


def test_batches_shrink_to_numbers_that_divide_them():
    assert [running._smaller(n) for n in (12, 9, 7, 2)] == [6, 3, 1, 1]
