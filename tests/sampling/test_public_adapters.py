"""Adapters of XLabs and InstantX in a pipeline and on the command line: what acts on them, and what is refused."""

import json
import re
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from dynaip_jax.adapters.instantx import InstantXConfig
from dynaip_jax.adapters.ip_adapter import IPAdapterConfig
from dynaip_jax.errors import UserError
from dynaip_jax.families.base import SIGLIP, Family
from dynaip_jax.images.files import read_settings
from dynaip_jax.models.siglip import SiglipVisionConfig
from dynaip_jax.sampling.conditions import make_image_prompt
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.storage.bundle import save_params
from dynaip_jax.storage.codec import to_dict
from tests.sampling.test_pipeline import draw, photographs

SIZES = dict(tokens=4, width=24, embedding=12, depth=2, num_heads=4, head_dim=16)
OTHER_SIZES = dict(
    tokens=5, width=24, embedding=36, hidden=20, depth=2, depth_single_blocks=2, num_heads=4, head_dim=16
)
SMALL = ("--steps", 2, "--height", 32, "--width", 32)


def adapter_file(path, **sizes):
    return random_file(path, IPAdapterConfig(**SIZES | sizes).shapes())


def instantx_file(path, **sizes):
    return random_file(path, InstantXConfig(**OTHER_SIZES | sizes).shapes())


def random_file(path, shapes):
    rng = np.random.default_rng(0)
    save_file({name: rng.normal(size=s, scale=0.3).astype(np.float32) for name, s in shapes.items()}, path)
    return path


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A bundle with CLIP's projection and SigLIP, as the converter makes one of a whole CLIP and that; and an adapter of 4 tokens."""
    folder = tmp_path_factory.mktemp("xlabs")
    bundle = shutil.copytree(tiny[0], folder / "bundle")
    kernel = np.random.default_rng(1).normal(size=(32, 12)).astype(np.float32)
    save_params(bundle / "clip_projection", {"kernel": kernel})
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["components"]["clip_projection"] = dict(config=dict(width=32, projection_dim=12))
    siglip, config = Family.other_encoders[SIGLIP], SiglipVisionConfig.tiny()
    params = jax.jit(lambda key: nn.meta.unbox(siglip.init(siglip.module(config), key)))(jax.random.key(0))
    save_params(bundle / SIGLIP, jax.tree.map(np.asarray, params))
    manifest["components"][SIGLIP] = dict(config=to_dict(config))
    del manifest["checksums"]
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    return bundle, adapter_file(folder / "ip_adapter.safetensors")


@pytest.fixture(scope="module")
def pipe(made):
    return DynaIPPipeline.load(*made)


@pytest.fixture(scope="module")
def instantx(made):
    return DynaIPPipeline.load(made[0], instantx_file(made[0].parent / "ip-adapter.safetensors"))


@pytest.mark.parametrize("whose", ["pipe", "instantx"])
def test_options_act_on_it_as_on_dynaip(made, whose, request):
    """Strength, steps, text rows, regions and several subjects; scale 0 is the base, bit for bit."""
    pipe, (a, b) = request.getfixturevalue(whose), photographs()
    mask = np.zeros((32, 48), np.float32)
    mask[:, :24] = 1
    plain = draw(DynaIPPipeline.load(made[0]))
    np.testing.assert_array_equal(draw(pipe, a, image_scale=0.0), plain)
    variants = [
        plain,
        draw(pipe, a),
        draw(pipe, b),
        draw(pipe, a, b, masks=[mask, 1 - mask]),
        draw(pipe, a, image_scale=0.5),
        draw(pipe, a, text_gain=1.0),
        draw(pipe, a, image_start=0.4),
        draw(pipe, b, fit="stretch"),
    ]
    if whose == "pipe":  # how blocks merge is the same for both
        variants += [draw(pipe, a, b), draw(pipe, a, b, merge="concat")]
    for i, x in enumerate(variants):
        for y in variants[:i]:
            assert (x != y).any()
    blocks = pipe.adapter[0].injected
    np.testing.assert_array_equal(draw(pipe, a, block_scale=[0.0] * blocks), plain)
    np.testing.assert_array_equal(draw(pipe, a, block_scale=[0.5] * blocks, image_scale=2.0), variants[1])
    assert (draw(pipe, a, block_scale=[1.0] + [0.0] * (blocks - 1)) != variants[1]).any()
    with pytest.raises(UserError, match=f"`block_scale`: 1 numbers; expected {blocks}, one for each block"):
        draw(pipe, a, block_scale=[1.0])
    with pytest.raises(UserError, match="`granularity`: this adapter reads .*, which has no levels"):
        draw(pipe, a, granularity=(0, 0, 1))


def test_it_reads_the_projected_embedding(pipe):
    """Twice the projection with half the adapter's own matrix is the same."""
    config, params = pipe.adapter
    pixels = np.random.default_rng(0).normal(size=(1, 1, 32, 32, 3)).astype(np.float32)
    twice = params | dict(clip_projection=dict(kernel=2 * params["clip_projection"]["kernel"]))
    half = params["adapter"] | dict(
        proj=params["adapter"]["proj"] | dict(kernel=params["adapter"]["proj"]["kernel"] / 2)
    )
    (one, routing), (two, _), (three, _) = (
        make_image_prompt(pipe.family, config, pipe.params["clip_vision"], p, pixels, {})
        for p in (params, twice | dict(adapter=half), twice)
    )
    assert routing is None and one.single is None and one.double.k.shape == (2, 1, 1, 4, 4, 16)
    np.testing.assert_allclose(one.double.k, two.double.k, atol=1e-5)
    assert np.abs(one.double.k - three.double.k).max() > 0.01


def test_text_rows_of_single_blocks_alone_read_instantx(instantx):
    """And the encoder is SigLIP, whose colours are from -1 to 1."""
    seen = []
    given = instantx.image_prompt

    def image_prompt(pixels, **options):
        seen.append(pixels)
        return given(pixels, **options)

    instantx.image_prompt = image_prompt
    draw(instantx, np.full((20, 30, 3), 255, np.uint8), fit="stretch")
    del instantx.image_prompt
    np.testing.assert_array_equal(seen[0], np.ones((1, 1, 20, 20, 3), np.float32))
    prompt, routing = instantx.image_prompt(seen[0], text_gain=0.5)
    assert routing is None and prompt.double.k.shape == prompt.single.k.shape == (2, 1, 1, 5, 4, 16)
    np.testing.assert_array_equal(np.ravel(prompt.text_gain), [0, 0, 0.5, 0.5])
    np.testing.assert_allclose(np.square(prompt.single.k).mean(-1), 1, atol=1e-3)
    assert "clip_vision" not in instantx.params and SIGLIP in instantx.params


def test_a_picture_says_it_and_is_drawn_again(dynaip, made, photograph, tmp_path):
    words = ("--model", made[0], "--adapter", made[1], "--prompt", "a cup", "--reference", photograph, *SMALL)
    status, _, stderr = dynaip(
        "sample", *words, "--image-scale", 0.5, "--block-scale", 1, 0.25, "--output", tmp_path / "a.png"
    )
    assert status == 0 and "routing" not in stderr, stderr
    settings = read_settings(tmp_path / "a.png")
    assert settings["block_scale"] == [1.0, 0.25]
    assert settings["image_scale"] == 0.5 and settings["routing"] is None and len(settings["adapter_fingerprint"]) == 64
    status, _, stderr = dynaip("sample", "--like", tmp_path / "a.png", "--output", tmp_path / "b.png")
    assert status == 0, stderr
    np.testing.assert_array_equal(*(np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png")))
    assert read_settings(tmp_path / "b.png") == settings


def test_a_bundle_without_the_encoder_says_what_to_do(tiny, made, tmp_path):
    with pytest.raises(UserError, match="has no siglip .*convert the model again with --clip-vision SIGLIP_FOLDER"):
        DynaIPPipeline.load(tiny[0], instantx_file(tmp_path / "ip-adapter.safetensors"))
    with pytest.raises(
        UserError, match="has no clip_projection, CLIP's visual_projection.*convert the model again with"
    ):
        DynaIPPipeline.load(tiny[0], made[1])


def names(*found):
    return lambda path: save_file({name: np.zeros((2, 2), np.float32) for name in found}, path)


@pytest.mark.parametrize(
    "write, said",
    [
        (lambda path: adapter_file(path, depth=3), "made for 3 dual-stream blocks, the model has 2"),
        (lambda path: adapter_file(path, num_heads=8), "tensors do not fit, the first double_blocks.0.processor"),
        (lambda path: adapter_file(path, embedding=20), "reads CLIP's embedding of 20 numbers"),
        (names("ip_adapter_proj_model.proj.weight", "ip_adapter_proj_model.norm.weight"), "shapes fit no XLabs adapter"),
        (names("image_proj.proj.0.weight", "ip_adapter.0.to_k_ip.weight"), "shapes fit no InstantX adapter"),
        (lambda path: random_file(path, InstantXConfig(**OTHER_SIZES).shapes() | {"image_proj.norm.weight": (0,)}), "shapes fit no InstantX adapter"),
        (lambda path: instantx_file(path, depth_single_blocks=3), "made for 3 single-stream blocks, the model has 2"),
        (lambda path: instantx_file(path, depth=1, depth_single_blocks=0), "shapes fit no InstantX adapter (1 blocks, expected 4)"),
        (lambda path: instantx_file(path, head_dim=8), "tensors do not fit, the first ip_adapter.0.to_k_ip.weight"),
        (lambda path: instantx_file(path, embedding=32), "reads SigLIP's pooled state of 32 numbers (google/siglip-so400m-patch14-384), the model's encoder gives 36"),
        (names("pulid_ca.0.norm1.weight"), "is a PuLID adapter"),
        (names("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "is an image-prompt adapter of another backbone"),
        (names("lora_unet_img_in.lora_down.weight"), "is a LoRA; pass it as `loras`"),
        (names("other"), "is no image-prompt adapter (its first tensor is other)"),
        (lambda path: path.write_text("<html>"), "not a whole safetensors file"),
    ],
)  # fmt: skip
def test_other_files_are_named(made, tmp_path, write, said):
    write(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=re.escape(said)):
        DynaIPPipeline.load(made[0], tmp_path / "x.safetensors")


def test_a_base_of_its_own_is_not_asked_of_it(made):
    with pytest.raises(UserError, match="`any_base`: the `adapter` is a file that belongs to no one base"):
        DynaIPPipeline.load(*made, any_base=True)
