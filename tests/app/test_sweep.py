"""`dynaip sweep`: its figure, the settings beside it, and what it refuses before any weights are read."""

import json

import numpy as np
import pytest

from dynaip_jax import images
from dynaip_jax.eval import figures
from dynaip_jax.sampling import denoise
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.storage.bundle import Bundle

SMALL = ("--height", 32, "--width", 32)


@pytest.fixture
def asked(tiny, photograph, tmp_path):
    """The words of a command that draws one picture, without its axes."""
    model = ("--model", tiny[0], "--adapter", tiny[1])
    return ("sweep", *model, "--prompt", "a cup", "--reference", photograph, *SMALL, "--output", tmp_path / "s.png")


def test_each_cell_is_the_picture_of_its_settings_and_shapes_that_agree_share_a_program(
    dynaip, asked, tiny, photograph, tmp_path, monkeypatch
):
    cells, traced = [], []
    table, loop = figures.table, denoise.denoising_loop
    monkeypatch.setattr(figures, "table", lambda rows, *a: cells.append((rows, *a)) or table(rows, *a))
    monkeypatch.setattr(denoise, "denoising_loop", lambda *a, **k: traced.append(len(a[5]) - 1) or loop(*a, **k))
    status, out, err = dynaip(*asked, "--x", "image_scale=0.2,0.6,1", "--y", "steps=1,2", "--seed", 3)
    assert (status, out.split()) == (0, [str(tmp_path / "s.png"), str(tmp_path / "s.json")]), err
    assert traced == [1, 2]
    (rows, columns, labels, title), values = cells[0], json.loads((tmp_path / "s.json").read_text())
    assert (columns, labels, title) == (
        ["image scale 0.2", "image scale 0.6", "image scale 1"], ["steps 1", "steps 2"], "a cup"
    )  # fmt: skip
    assert (values["x"], values["y"]) == (
        dict(option="image_scale", values=[0.2, 0.6, 1.0]), dict(option="steps", values=[1, 2])
    )  # fmt: skip
    settings = values["pictures"]
    assert [[(c["image_scale"], c["steps"], c["seed"]) for c in row] for row in settings] == [
        [(x, y, 3) for x in (0.2, 0.6, 1.0)] for y in (1, 2)
    ]
    assert settings[1][2]["reference"] == [str(photograph)]
    pipe = DynaIPPipeline.load(*tiny)
    for y, x in ((0, 1), (1, 2)):
        own = {name: settings[y][x][name] for name in ("image_scale", "steps", "seed", "height", "width")}
        alone = pipe("a cup", photograph, **own).images[0]
        np.testing.assert_array_equal(rows[y][x].picture, np.asarray(alone))
    assert (rows[0][0].picture != rows[0][2].picture).any()
    assert images.read_settings(tmp_path / "s.png")["prompt"] == "a cup"


@pytest.mark.parametrize(
    "words, found",
    [
        ([], "--x: none given; expected an option and its values"),
        (["--x", "size=1"], "--x size: no option to vary; expected one of"),
        (["--x", "seed=1,2", "--y", "seed=3"], "--y seed: varies along x already"),
        (["--x", "image_scale=1,2", "--image-scale", 1], "--image-scale: given, and varied; expected either"),
        (["--x", "seed=1,2", "--num-images", 2], "--num-images 2: expected 1, one picture at a time"),
        (["--x", "seed=1,2", "--prompt", "a cat"], "--prompt: 2 prompts; expected one"),
        (["--x", "height=32,40"], "--height: given, and varied; expected either"),
        (["--x", "guidance=1,2", "--y", "true_cfg=2,3"], "--true-cfg 2.0: needs something to steer away from"),
        (["--x", "image_scale=1:2:3"], "--image-scale (1.0, 2.0, 3.0): expected one number, or one for each of 1 references"),
        (["--x", "seed=1,2", "--output", "s.jpg"], "s.jpg: output name ends in '.jpg'; expected .png"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_before_weights_are_read(dynaip, asked, tmp_path, monkeypatch, words, found):
    monkeypatch.setattr(Bundle, "load", lambda *_, **__: pytest.fail("weights were read"))
    status, out, err = dynaip(*asked, *words)
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and found in err, err
    assert not list(tmp_path.glob("s.*"))


def test_nothing_is_replaced_and_references_are_needed_by_what_acts_on_them(dynaip, asked, tmp_path):
    (tmp_path / "s.json").write_text("mine")
    status, _, err = dynaip(*asked, "--x", "seed=1,2")
    assert status == 2 and "s.json: exists; expected a free name for the values" in err
    alone = ("sweep", "--prompt", "a star", "--output", tmp_path / "t.png", "--x")
    assert "--text-gain: needs a reference picture to act on" in dynaip(*alone, "text_gain=0,1")[2]
