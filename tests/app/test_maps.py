"""`dynaip maps` and `dynaip routing`: their figures, the values beside them, and what they refuse."""

import json

import numpy as np
import pytest

from dynaip_jax import images
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.storage.bundle import Bundle

SMALL = ("--height", 32, "--width", 32, "--steps", 2)


@pytest.fixture
def asked(tiny, photograph, tmp_path):
    model = ("--model", tiny[0], "--adapter", tiny[1])
    return ("maps", *model, "--prompt", "a cup and a cat", *SMALL, "--output", tmp_path / "m.png", "--looks", 2)


def test_maps_of_two_subjects_with_regions(dynaip, asked, photograph, tmp_path):
    subjects = ("--subject", f"{photograph}=cup", "--subject", f"{photograph}=cat")
    status, out, err = dynaip(*asked, *subjects)
    assert status == 0 and "routing weights low" in err, err
    assert out.split() == [str(tmp_path / name) for name in ("m.png", "m_regions.png", "m.json")]
    values = json.loads((tmp_path / "m.json").read_text())
    on, off = values["views"]
    assert (on["label"], on["text_gain"], off["label"], off["text_gain"]) == ("DDS on", [0, 0], "DDS off", [1, 1])
    assert np.shape(on["places"]) == (len(values["blocks"]), 2, 2, 2) and values["steps"] == [0, 1]
    np.testing.assert_allclose(np.sum(values["regions"], axis=1), 1, atol=1e-4)
    np.testing.assert_allclose(np.sum(on["read_by_text"], axis=-1), 1, atol=1e-3)
    assert values["settings"]["DDS off"]["text_gain"] == 1.0
    assert images.read_settings(tmp_path / "m_regions.png")["maps"]["DDS on"]["words"] == ["cup", "cat"]


@pytest.mark.parametrize(
    "words, found",
    [
        ([], "--reference: none given; expected at least one, whose maps these are"),
        (["--reference", "{photo}", "--looks", 3], "--looks 3: expected a number from 1 to 2"),
        (["--reference", "{photo}", "--blocks", 9], "--blocks 9: expected numbers from 0 to 3"),
        (["--reference", "{photo}", "--num-images", 2], "--num-images 2: expected 1"),
        (["--planted", 4], "--prompt: of a picture, and --planted makes none"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_before_weights_are_read(
    dynaip, asked, photograph, tmp_path, monkeypatch, words, found
):
    monkeypatch.setattr(Bundle, "load", lambda *_, **__: pytest.fail("weights were read"))
    status, out, err = dynaip(*asked, *(str(word).format(photo=photograph) for word in words))
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and found in err, err
    assert not list(tmp_path.glob("m*"))


def test_planted_subjects_are_of_shapeland(dynaip, tiny):
    status, _, err = dynaip("maps", "--model", tiny[0], "--adapter", tiny[1], "--planted", 2)
    assert status == 2 and "expected a model of Shapeland" in err
    assert "--planted 0: expected a number from 1" in dynaip("maps", "--planted", 0)[2]


def test_routing_of_pictures_and_of_the_set(dynaip, tiny, photograph, tmp_path, monkeypatch):
    import skimage.data
    from PIL import Image

    other = tmp_path / "astronaut.png"
    Image.fromarray(skimage.data.astronaut()).save(other)
    model = ("--model", tiny[0], "--adapter", tiny[1])
    loaded, load = [], Bundle.load
    monkeypatch.setattr(Bundle, "load", lambda self, name, *a, **k: loaded.append(name) or load(self, name, *a, **k))
    status, out, err = dynaip("routing", photograph, other, *model, "--output", tmp_path / "r.png")
    assert (status, out.split()) == (0, [str(tmp_path / "r.png"), str(tmp_path / "r.json")]), err
    assert loaded == ["clip_vision"], "no other weights are needed"
    values = json.loads((tmp_path / "r.json").read_text())
    rows = np.array([list(row["weights"].values()) for row in values["pictures"]])
    pipe = DynaIPPipeline.load(*tiny)
    each = [pipe("a cup", picture, steps=1, height=32, width=32).routing[0] for picture in (photograph, other)]
    np.testing.assert_allclose(rows, each, atol=2e-4)
    assert values["means"]["low"]["mean"] == pytest.approx(rows[:, 0].mean(), abs=1e-4)
    low, high = values["means"]["low"]["interval"]
    assert low <= values["means"]["low"]["mean"] <= high
    status, _, err = dynaip("routing", photograph, "--model", tiny[0])
    assert status == 2 and "--adapter: none given; expected the one whose router this is" in err
    status, _, err = dynaip("routing", tmp_path / "nothing.jpg", *model, "--output", tmp_path / "q.png")
    assert status == 2 and "nothing.jpg" in err and not (tmp_path / "q.png").exists()
