"""The definitions of the scores, worked out by hand on embeddings of two dimensions."""

import numpy as np
import pytest
from PIL import Image

from dynaip_jax.measuring.likeness import Likeness
from dynaip_jax.measuring.networks import ClipMeasure, DinoMeasure
from dynaip_jax.measuring.sets import Case, Subject

UP, RIGHT, SLANTED = np.array([0, 1.0]), np.array([1.0, 0]), np.array([0.6, 0.8])
COLOURS = {(255, 0, 0): UP, (0, 255, 0): RIGHT, (0, 0, 255): SLANTED}


class Clip(ClipMeasure):
    """Embeds a picture by the colour in its middle, a text by its length."""

    name = "CLIP tiny"

    def __init__(self):
        self.seen = 0

    def images(self, pictures):
        self.seen += len(pictures)
        return np.stack([COLOURS[tuple(p[p.shape[0] // 2, p.shape[1] // 2])] for p in pictures])

    def texts(self, texts):
        return np.stack([SLANTED if len(text) == 5 else RIGHT for text in texts])


class Dino(DinoMeasure):
    name = "DINO tiny"
    __init__, images = Clip.__init__, Clip.images

    def patches(self, picture):
        return self.images([p[None, None] for row in picture[::16, ::16] for p in row]).reshape(4, 4, 2)


@pytest.fixture
def files(tmp_path):
    for name, colour in zip(("up", "right", "slanted"), COLOURS, strict=True):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(tmp_path / "left.png")
    Image.fromarray(255 - mask).save(tmp_path / "rest.png")
    return lambda *names: tuple(str(tmp_path / f"{name}.png") for name in names)


def test_means_of_cosines(files):
    clip = Clip()
    likeness = Likeness([clip, clip])
    picture = np.full((64, 64, 3), (0, 0, 255), np.uint8)  # slanted
    case = Case("a", "a cup", (Subject(files("up", "right")),))
    assert likeness.scores(case, picture) == pytest.approx({"CLIP-I, CLIP tiny": 0.7, "CLIP-T, CLIP tiny": 1.0})
    two = Case("b", "two things", (Subject(files("up", "right")), Subject(files("slanted"))))
    assert likeness.scores(two, picture) == pytest.approx({"CLIP-I, CLIP tiny": 0.85, "CLIP-T, CLIP tiny": 0.6})
    assert clip.seen == 2 + 3, "each reference once"
    assert likeness.scores(case, picture)["CLIP-I, CLIP tiny"] == pytest.approx(0.7)
    assert Likeness([]).scores(two, picture) == {}
    only = Likeness([Dino()]).scores(case, picture)
    assert only == pytest.approx({"DINO-I, DINO tiny": 0.7}), "one subject cannot collapse into another"


def test_collapsed_by_given_and_by_found_regions(files):
    good = np.zeros((64, 64, 3), np.uint8)
    good[:, :32], good[:, 32:] = (255, 0, 0), (0, 255, 0)
    clones = np.zeros((64, 64, 3), np.uint8)
    clones[...] = (255, 0, 0)
    up, right = files("up"), files("right")
    given = Case("a", "x", (Subject(up, mask=files("left")[0]), Subject(right, mask=files("rest")[0])))
    likeness = Likeness([Dino()])
    assert likeness.scores(given, good)["collapsed"] == 0
    assert likeness.scores(given, clones)["collapsed"] == 0.5
    found = Case("b", "x", (Subject(up), Subject(right)))
    scene = np.full((64, 64, 3), (0, 0, 255), np.uint8)
    scene[16:32, 16:32], scene[32:48, 32:48] = (255, 0, 0), (0, 255, 0)
    assert likeness.scores(found, scene)["collapsed"] == 0
    scene[32:48, 32:48] = (255, 0, 0)
    assert likeness.scores(found, scene)["collapsed"] == 0.5
