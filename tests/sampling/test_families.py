"""The pipeline with the second family: what only it has, and its weights. test_adapter.py has what an adapter does in both."""

import numpy as np
import pytest
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from dynaip_jax.errors import UserError
from dynaip_jax.sampling import natives
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.testing import tiny_family

PROMPT = "a star and a moon"
SMALL = dict(height=48, width=64, steps=2, seed=1)


@pytest.fixture(scope="module")
def pipe(tiny2):
    return DynaIPPipeline.load(*tiny2)


@pytest.fixture(scope="module")
def plain(tiny2):
    """Without an adapter."""
    return DynaIPPipeline.load(tiny2[0])


@pytest.fixture(scope="module")
def base(plain):
    return draw(plain)


def draw(pipe, references=(), **options):
    return np.asarray(pipe(PROMPT, references, **SMALL | options).images[0]).astype(int)


def test_guidance_away_from_a_negative_prompt_and_the_step_cache(plain, base):
    assert np.abs(draw(plain, negative_prompt="blurry") - base).max() > 0
    np.testing.assert_array_equal(draw(plain, true_cfg=1.0), base)
    assert plain(PROMPT, **SMALL, cache_threshold=99.0).settings["cached_steps"] == 1
    assert np.abs(draw(plain, cache_threshold=1e-9) - base).max() <= 1
    with pytest.raises(UserError, match="this model has no guidance embedding"):
        draw(plain, guidance=3.0)
    with pytest.raises(UserError, match="`height` 40: expected a positive multiple of 16"):
        draw(plain, height=40)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_eight_bit_weights_and_bfloat16(tiny2, base, weights):
    small = DynaIPPipeline.load(tiny2[0], weights=weights, dtype="bfloat16")
    assert 0 < np.abs(draw(small) - base).mean() < 8


def test_native_references_alone_and_with_the_bank(pipe, plain, base, photograph):
    small = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)
    alone = draw(plain, native_references=small)
    assert np.abs(alone - base).max() > 0
    np.testing.assert_array_equal(draw(pipe, photograph, image_scale=0, native_references=small), alone)
    assert np.abs(draw(pipe, photograph, native_references=small) - alone).max() > 0
    assert np.abs(draw(plain, native_references=[small, small[:, ::-1]]) - alone).max() > 0
    guided = SMALL | dict(negative_prompt="", native_references=small)
    both, one = plain([PROMPT, "x"], **guided), plain(PROMPT, **guided)
    np.testing.assert_allclose(np.asarray(both.images[0]).astype(int), np.asarray(one.images[0]), atol=1)


def test_native_references_that_cannot_be_read(plain, photograph):
    with pytest.raises(UserError, match="`native_references` 1: 40 x 12 pixels; expected at least 16 a side"):
        draw(plain, native_references=np.zeros((12, 40, 3), np.uint8))
    with pytest.raises(UserError, match="`native_references`: 17 pictures; expected at most 16"):
        draw(plain, native_references=np.zeros((17, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="`native_references`: this model reads no pictures by itself"):
        natives.Natives.read(photograph, tiny_family("flux"))


@pytest.mark.parametrize("size", [(1200, 1000), (70, 90), (2100, 500)])
def test_native_references_are_fitted_as_diffusers_does(size):
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    picture = Image.fromarray(noise).resize(size)
    processor, theirs = Flux2ImageProcessor(vae_scale_factor=16), picture
    if size[0] * size[1] > 1024 * 1024:
        theirs = processor._resize_to_target_area(picture, 1024 * 1024)
    width, height = (side // 16 * 16 for side in theirs.size)
    theirs = processor.preprocess(theirs, height=height, width=width, resize_mode="crop")[0].permute(1, 2, 0).numpy()
    ours = natives.fitted(np.asarray(picture), 16)
    np.testing.assert_allclose(ours.astype(np.float32) / 127.5 - 1, theirs, atol=1e-6)


def test_command_draws_and_draws_again(dynaip, tiny2, photograph, tmp_path):
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "native.png")
    command = f"--model {tiny2[0]} --adapter {tiny2[1]} --steps 2 --height 48 --width 64 --subject {photograph}=star"
    command += f" --native-reference {tmp_path}/native.png"
    status, _, stderr = dynaip("sample", *command.split(), "--prompt", PROMPT, "--output", tmp_path / "a.png")
    assert status == 0, stderr
    status, _, stderr = dynaip("sample", "--like", tmp_path / "a.png", "--output", tmp_path / "b.png")
    assert status == 0, stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    Image.fromarray(np.ones((32, 48, 3), np.uint8)).save(tmp_path / "native.png")
    status, _, stderr = dynaip("sample", "--like", tmp_path / "a.png", "--output", tmp_path / "c.png")
    assert status == 2 and "--native-reference 1: not what" in stderr
