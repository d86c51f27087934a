"""Sets: the layouts of the public benchmarks, lists of one's own, and what is said of those that lack something."""

import json
import re
import shutil

import pytest
from PIL import Image

from dynaip_jax.errors import UserError
from dynaip_jax.measuring.sets import chosen, read_set

DREAMBENCH = """Classes

subject_name,class
bear_plushie,stuffed animal
dog2,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


def picture(path, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (colour, 0, 0)).save(path)
    return path


def test_dreambench(tmp_path):
    folder = tmp_path / "dreambooth" / "dataset"
    for n, name in enumerate(("bear_plushie/01.jpg", "bear_plushie/00.jpg", "dog2/00.jpg")):
        picture(folder / name, n)
    (folder / "prompts_and_classes.txt").write_text(DREAMBENCH)
    found = read_set(tmp_path / "dreambooth")
    assert found.name == "DreamBench" and read_set(folder).cases == found.cases
    assert [(c.name, c.prompt) for c in found.cases] == [
        ("bear_plushie.00", "a stuffed animal in the jungle"),
        ("bear_plushie.01", "a cube shaped stuffed animal"),
        ("dog2.00", "a dog wearing a red hat"),
    ]
    (bear,) = found.cases[0].subjects
    assert [p[-6:] for p in bear.pictures] == ["00.jpg", "01.jpg"] and bear.words == "stuffed animal"
    assert "2 subjects with 1 or 2 prompts each; DreamBench has 30 with 25" in found.notes[0]
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert read_set(moved).fingerprint() == found.fingerprint()
    picture(moved / "dog2" / "00.jpg", 9)
    assert read_set(moved).fingerprint() != found.fingerprint()
    shutil.rmtree(moved / "dog2")
    with pytest.raises(UserError, match="the subject dog2: no pictures in .*; download the set again"):
        read_set(moved)
    (moved / "prompts_and_classes.txt").write_text("nothing")
    with pytest.raises(UserError, match="no classes, or not both lists"):
        read_set(moved)


def test_dreambench_plus(tmp_path):
    for kind, name, text in (
        ("animal", "01", "Cat\nA cat on a roof\n\nA sleeping cat, watercolour\n"),
        ("style", "00", "Oil painting\nA lighthouse at night"),
    ):
        picture(tmp_path / "images" / kind / f"{name}.jpg")
        (tmp_path / "captions" / kind).mkdir(parents=True)
        (tmp_path / "captions" / kind / f"{name}.txt").write_text(text)
    found = read_set(tmp_path)
    assert [(c.name, c.prompt, c.kind, c.subjects[0].words) for c in found.cases] == [
        ("animal.01.0", "A cat on a roof", "subject", "cat"),
        ("animal.01.1", "A sleeping cat, watercolour", "subject", "cat"),
        ("style.00.0", "A lighthouse at night", "style", ""),
    ]
    assert found.name == "DreamBench++" and "150 with 9" in found.notes[0]
    (tmp_path / "captions" / "style" / "00.txt").write_text("Oil painting")
    with pytest.raises(UserError, match="no prompts"):
        read_set(tmp_path)
    (tmp_path / "images" / "animal" / "01.jpg").unlink()
    with pytest.raises(UserError, match="animal/01 has no picture"):
        read_set(tmp_path)


def test_a_list_of_ones_own(tmp_path):
    for name in ("a.jpg", "b.jpg", "m.png", "n.png"):
        picture(tmp_path / name)
    rows = [
        dict(prompt="a cup", references=["a.jpg"]),
        dict(
            prompt="a cup and a dog",
            references=[["a.jpg", "b.jpg"], "b.jpg"],
            words=["cup", "dog"],
            masks=["m.png", "n.png"],
            name="two",
        ),
    ]
    path = tmp_path / "set.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    one, two = read_set(path).cases
    assert one.name == "0000" and two.name == "two" and [len(s.pictures) for s in two.subjects] == [2, 1]
    assert two.subjects[1].words == "dog" and two.subjects[1].mask == str(tmp_path / "n.png")
    assert [c.name for c in chosen([one, two], 1)] == ["0000"] and chosen([one, two], 5) == [one, two]
    for row, message in (
        ("{", "line 1: not JSON"),
        (dict(references=["a.jpg"]), "`prompt`: missing"),
        (dict(prompt="x"), "`references`: expected the files"),
        (dict(prompt="x", references=["no.jpg"]), "line 1: .*no.jpg: no such file"),
        (dict(prompt="x", references=["a.jpg"], words=["a", "b"]), "`words`: 2 for 1 subjects"),
        (dict(prompt="x", references=["a.jpg"], name="../x"), "`name` ../x: expected letters"),
        (dict(prompt="x", references=["a.jpg"], seed=3), "`seed`: unknown; expected some of masks, name"),
        ("", "0 lines; expected at least one"),
    ):
        path.write_text(row if isinstance(row, str) else json.dumps(row))
        with pytest.raises(UserError) as e:
            read_set(path)
        assert re.search(message, e.value.args[0]) and "\n" not in str(e.value), e.value.args[0]
    with pytest.raises(UserError, match="no set; expected prompts_and_classes.txt"):
        read_set(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_set(tmp_path / "none.jsonl")
