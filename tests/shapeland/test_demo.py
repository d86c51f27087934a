"""`dynaip demo` with a drawing of your own."""

import numpy as np
from PIL import Image

from dynaip_jax.images.files import read_settings
from dynaip_jax.shapeland import demo, world


def test_a_drawing_of_ones_own(dynaip, tmp_path):
    scene = world.sample_scene(world.generator(0, "test", 4), large=True)
    Image.fromarray(world.render(scene).image).resize((300, 300)).save(tmp_path / "mine.png")
    prompt = f"a {scene.subjects[0].kind} on the left on sand at noon"
    command = ("demo", "--output", tmp_path / "o.png", "--reference", tmp_path / "mine.png")
    status, stdout, stderr = dynaip(*command, "--prompt", prompt)
    assert status == 0 and stdout.split() == [str(tmp_path / "o.png")], stderr
    rows = read_settings(tmp_path / "o.png")["rows"]
    assert rows[0] == [prompt, "reference", "text only", "DDS off", "DDS on (default)"] and len(rows) == 2
    status, _, stderr = dynaip(*command, "--overwrite")
    assert status == 2 and "--reference: given without --prompt" in stderr


class Painter:
    """Paints nothing, and notes what it is asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, text, *references, **options):
        self.asked.append((text, len(references), options))
        return np.zeros((64, 64, 3), np.uint8)


def test_ten_references_that_nobody_chose(tmp_path, monkeypatch):
    """Each class once, twice alone and in one picture with others, each with DDS off and on; the prompts name what the picture is to show."""
    painter = Painter()
    monkeypatch.setattr(demo, "_painter", lambda: painter)
    kept = demo.draw(tmp_path / "o.png", overwrite=False)
    alone = [(text, options) for text, count, options in painter.asked if count == 1]
    assert len(alone) == 4 * len(world.CLASSES) and len(painter.asked) == len(alone) + 2 * len(demo.SEVERAL)
    assert [options["text_gain"] for _, _, options in painter.asked] == [1.0, 0.0] * (len(painter.asked) // 2)
    for kind in world.CLASSES:
        assert sum(kind in text.split() for text, _ in alone) == 4
    for text, count, options in painter.asked[len(alone) :]:
        assert len(options["words"]) == count and set(options["words"]) <= set(text.split())
    assert set(read_settings(kept.path)["prompts"]) == {text for text, _, _ in painter.asked}
    assert Image.open(kept.path).width == demo.CELL * len(demo.HEADER)


def test_a_figure_that_cannot_be_written_lies_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_painter", lambda: Painter())
    (tmp_path / "o.png").write_text("another's")
    kept = demo.draw(tmp_path / "o.png", overwrite=False)
    assert kept.path == tmp_path / "o-1.png" and "exists already" in kept.reason
    assert (tmp_path / "o.png").read_text() == "another's"
