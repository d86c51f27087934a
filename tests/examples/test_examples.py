"""Examples do what they say, as they stand in the folder."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dynaip_jax
from dynaip_jax import images

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = {
    "one_subject": (64, 64),
    "two_with_words": (64, 64),
    "two_with_masks": (64, 64),
    "style_or_identity": (800, 176),
    "sweep": None,
}  # name -> size of what it draws


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Runs an example -> the file it wrote."""
    folder = tmp_path_factory.mktemp("examples")

    def run(name):
        output = folder / f"{name}.png"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, str(output)])
            try:
                runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
            except SystemExit as e:
                assert not e.code
        return output

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_draws_its_picture(drawn, name):
    picture = Image.open(drawn(name))
    assert SCRIPTS[name] in (None, picture.size)
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 200
    if name == "sweep":
        values = json.loads(Path(picture.filename).with_suffix(".json").read_text())
        assert np.shape([[cell["seed"] for cell in row] for row in values["pictures"]]) == (2, 3)
        assert images.read_settings(picture.filename)["x"]["option"] == "image_scale"


def test_the_notebook_has_no_outputs_and_runs(monkeypatch):
    monkeypatch.setattr(dynaip_jax, "keep_compiled", lambda: None, raising=False)
    cells = json.loads((FOLDER / "notebook.ipynb").read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in codes)
    names = {}
    for cell in codes:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert len(names["pictures"]) == 3 and names["figure"].width > 400 and names["result"].routing.shape == (1, 3)
