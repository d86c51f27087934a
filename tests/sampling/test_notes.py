"""What is accepted although it is lost or changes nothing is said; what acts is not."""

import dataclasses
import re

import numpy as np
import pytest

from dynaip_jax import images
from dynaip_jax.families.registry import family_of, open_bundle
from dynaip_jax.sampling.conditions import Subjects
from dynaip_jax.sampling.notes import notes
from dynaip_jax.sampling.options import SampleOptions, reference_options

FILLED = dict(steps=4, guidance=3.5, height=32, width=32)
GREY = np.full((32, 32, 3), 128, np.uint8)
LEFT = np.repeat(np.arange(32) < 16, 32).reshape(32, 32).T


@pytest.fixture(scope="module")
def lines(tiny):
    bundle = open_bundle(tiny[0])
    tokenizers = family_of(bundle).load_tokenizers(bundle.path / "tokenizers")

    def told(prompt="a cup and a hat", references=2, masks=(), words=(), **options):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        given = SampleOptions(**options)
        used = given.filled(FILLED, multiple=16, takes_guidance=True)
        subjects = Subjects.read([GREY] * references, masks, words)
        return notes(tokenizers, prompts, subjects, subjects.regions(given.regions), given, used)

    return told


CUP_AND_HAT = ("cup", "hat")


@pytest.mark.parametrize(
    ("call", "expected"),
    (
        (dict(references=0), []),
        (dict(), []),
        (dict(words=CUP_AND_HAT), []),
        (dict(words=CUP_AND_HAT, regions="auto", merge="concat", negative_prompt="dull"), []),
        (dict(regions="none"), []),
        (dict(words=CUP_AND_HAT, regions="none"), ["`words`: with `regions` none they change nothing"]),
        (dict(references=1, words="cup"), ["`words`: one subject alone .*`masks` would give it a place"]),
        (dict(references=1, merge="sum"), ["`merge` sum: with one reference it changes nothing"]),
        (dict(masks=[LEFT, ~LEFT]), []),
        (dict(masks=[LEFT, ~LEFT], regions="none"), ["`regions` none: `masks` say where subjects appear"]),
        (dict(masks=[LEFT, ~LEFT], words=CUP_AND_HAT), ["`words`: `masks` say where .* the words change nothing"]),
        (dict(masks=[LEFT, LEFT / 10]), ["`masks` 2: the mask is nearly empty: 5.00%"]),
        (dict(prompt="a cup, a hat and a cup", words=CUP_AND_HAT), ["`words`, subject 1: 'cup' .* 2 times; #1 is taken; cup#2"]),
        (dict(prompt=["a hat, a cup", "a cup, a cup, a hat"], words=CUP_AND_HAT), ["prompt 2: `words`, subject 1: 'cup'"]),
        (dict(prompt="a cup, a hat and a cup", words=("cup#2", "hat")), []),
        (dict(negative_prompt="dull", true_cfg=1.0), ["`negative_prompt`: with `true_cfg` 1 it changes nothing"]),
        (dict(image_start=0.8), ["`image_start` 0.8 `image_end` 1.0: none of 4 steps .*the last begins at 0.75"]),
        (dict(image_start=0.3, image_end=0.45), ["none of 4 steps lies in there, the references do not act"]),
        (dict(image_start=0.75), []),
        (dict(image_end=1e-3), []),
        (dict(image_start=0.99, steps=16), ["none of 16 steps"]),
        (dict(image_start=0.99, steps=200), []),
        (dict(prompt="y" * 75 + "tail"), ["prompt: the CLIP encoder takes no more; it does not see: 'tail'"]),
        (dict(prompt=["a", "y" * 75 + "tail"]), ["prompt 2: the CLIP encoder .*'tail'"]),
        (dict(negative_prompt="y" * 75 + "tail"), ["negative prompt: the CLIP encoder .*'tail'"]),
        (dict(prompt="y" * 1000), ["prompt: the T5 encoder", "prompt: the CLIP encoder"]),
    ),
)  # fmt: skip
def test_lines(lines, call, expected):
    found = lines(**call)
    assert len(found) == len(expected), found
    for line, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, line) and len(line) < 300 and "\n" not in line


def test_words_that_no_encoder_knows(lines, monkeypatch):
    from dynaip_jax.families.tokenizers import Tokenizers

    monkeypatch.setattr(
        Tokenizers, "unknown", lambda self, text: dict(T5=["cat"], CLIP=["cat"]) if "cat" in text else {}
    )
    assert lines(["a dog", "a cat"], 0) == ["prompt 2: not in the vocabulary of T5 and CLIP: cat"]
    monkeypatch.setattr(Tokenizers, "unknown", lambda self, text: dict(T5=["cat"]) if "cat" in text else {})
    assert lines("a cat", 0) == ["prompt: not in the vocabulary of T5: cat"]


OTHER = dict(
    regions="none", fit="crop", image_scale=0.5, text_gain=1.0, granularity=(1, 0, 0), merge="sum", image_start=0.5, image_end=0.5,
    block_scale=(1.0, 0.5),
)  # fmt: skip


@pytest.mark.parametrize("name", reference_options())
def test_options_of_references_without_one(lines, name):
    assert lines(references=0, **{name: OTHER[name]}) == [f"`{name}`: without a reference picture it changes nothing"]


def test_every_option_of_references_is_tried():
    assert set(OTHER) == {f.name for f in dataclasses.fields(SampleOptions) if f.metadata["reference"]}


def test_masks_of_a_call_are_those_of_files(tmp_path):
    images.save_png(np.repeat(LEFT[..., None], 3, axis=-1).astype(np.uint8) * 255, tmp_path / "m.png", {})
    subjects = Subjects.read([GREY, GREY], [tmp_path / "m.png", LEFT])
    np.testing.assert_array_equal(*(mask.fitted(32, 32) for mask in subjects.masks))
