"""LoRAs that a pipeline and the command line are given: they act, are recorded, and are found again."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from dynaip_jax.errors import UserError
from dynaip_jax.images.files import read_settings
from dynaip_jax.sampling import loras
from dynaip_jax.sampling.pipeline import DynaIPPipeline

SIZE = dict(steps=2, height=32, width=32)
SMALL = ("--steps", 2, "--height", 32, "--width", 32)


def lora(path, seed=0, metadata=None, text=True, **more):
    """A file for the tiny model: a layer of the transformer, and with `text` one of each text encoder."""
    rng = np.random.default_rng(seed)
    modules = {"lora_unet_double_blocks_0_img_attn_qkv": (192, 64), "lora_unet_single_blocks_1_linear1": (448, 64)}
    if text:
        modules["lora_te1_text_model_encoder_layers_0_mlp_fc1"] = (64, 32)
        modules["lora_te3_encoder_block_0_layer_0_SelfAttention_q"] = (32, 32)
    tensors = dict(more)
    for name, (out, in_) in modules.items():
        tensors[f"{name}.lora_down.weight"] = rng.normal(size=(2, in_)).astype(np.float32)
        tensors[f"{name}.lora_up.weight"] = rng.normal(size=(out, 2)).astype(np.float32)
        tensors[f"{name}.alpha"] = np.ones((), np.float32)
    save_file(tensors, path, metadata)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return lora(folder / "a=1.safetensors"), lora(folder / "b.safetensors", seed=1, text=False)


def draw(bundle, *given, **options):
    return np.asarray(DynaIPPipeline.load(bundle, loras=given, **options)("a cat", **SIZE).images[0], int)


def leaves(pipe, name):
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(pipe.params[name])]


def test_each_file_acts_as_strongly_as_its_scale(tiny, files):
    plain, one, half, both = (draw(tiny[0], *given) for given in ((), files[:1], [(files[0], 0.5)], files))
    np.testing.assert_array_equal(draw(tiny[0], (files[0], 0)), plain)
    for x, y in ((plain, one), (one, half), (one, both), (plain, both)):
        assert np.abs(x - y).max() > 2
    np.testing.assert_array_equal(draw(tiny[0], (files[0], 0.25), (files[0], 0.25)), half)


def test_text_encoders_are_merged_too_and_what_is_not_named_is_not(tiny, files):
    plain, merged = DynaIPPipeline.load(tiny[0]), DynaIPPipeline.load(tiny[0], loras=files[0])
    changed = {
        name: sum(not np.array_equal(x, y) for x, y in zip(leaves(plain, name), leaves(merged, name), strict=True))
        for name in plain.params
    }
    assert changed == dict(transformer=3, vae=0, t5=1, clip_text=1)


def test_weights_are_merged_before_they_are_rounded_and_wherever_they_are(tiny, files):
    """In 8 bits, and in the host's memory."""
    full = DynaIPPipeline.load(tiny[0], loras=files)
    small = DynaIPPipeline.load(tiny[0], loras=files, weights="int8", offload_text=True)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(small.params["t5"])} == {"pinned_host"}
    for x, y in zip(leaves(full, "t5"), leaves(small, "t5"), strict=True):
        np.testing.assert_array_equal(x, y)
    mlp, rounded = (p.params["transformer"]["single_blocks"]["mlp_in"]["kernel"] for p in (full, small))
    scale = np.asarray(rounded.array.scale)
    np.testing.assert_allclose(np.asarray(rounded.array.qvalue) * scale, np.asarray(mlp), atol=0.51 * scale.max())


def test_a_folder_of_peft_with_its_alpha(tiny, tmp_path):
    rng, name = np.random.default_rng(0), "base_model.model.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": rng.normal(size=(2, 64)), f"{name}.lora_B.weight": rng.normal(size=(64, 2))}
    tensors = {key: x.astype(np.float32) for key, x in tensors.items()}
    for folder, alpha in (("a", 2), ("b", 6)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "adapter_model.safetensors")
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(dict(r=2, lora_alpha=alpha)))
    np.testing.assert_array_equal(draw(tiny[0], (tmp_path / "a", 3.0)), draw(tiny[0], tmp_path / "b"))


def test_a_picture_says_its_loras_and_is_drawn_again_with_them(dynaip, tiny, files, tmp_path):
    words = ("--model", tiny[0], "--prompt", "a cat", *SMALL)
    given = ("--lora", f"{files[0]}=0.5", f"--lora={files[1]}")
    status, _, stderr = dynaip("sample", *words, *given, "--output", tmp_path / "a.png")
    assert status == 0, stderr
    settings = read_settings(tmp_path / "a.png")
    assert settings["lora"] == [str(f) for f in files] and settings["lora_scale"] == [0.5, 1.0]
    assert [len(x) for x in settings["lora_fingerprint"]] == [64, 64]
    status, _, stderr = dynaip("sample", "--like", tmp_path / "a.png", "--output", tmp_path / "b.png")
    assert status == 0, stderr
    np.testing.assert_array_equal(*(np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png")))
    assert read_settings(tmp_path / "b.png") == settings
    status, _, _ = dynaip("sample", *words, "--output", tmp_path / "c.png")
    assert status == 0 and not any("lora" in name for name in read_settings(tmp_path / "c.png"))
    assert (np.asarray(Image.open(tmp_path / "c.png")) != np.asarray(Image.open(tmp_path / "a.png"))).any()


def test_another_file_under_the_same_name_is_not_drawn_with(dynaip, tiny, tmp_path):
    path = lora(tmp_path / "a.safetensors")
    words = ("--model", tiny[0], "--prompt", "a cat", *SMALL)
    assert dynaip("sample", *words, "--lora", path, "--output", tmp_path / "a.png")[0] == 0
    lora(path, seed=5)
    status, _, stderr = dynaip("sample", "--like", tmp_path / "a.png", "--output", tmp_path / "b.png")
    assert status == 2 and "--lora 1: not what" in stderr and "pass --lora to draw with it" in stderr
    status, _, stderr = dynaip("sample", "--like", tmp_path / "a.png", "--lora", path, "--output", tmp_path / "b.png")
    assert status == 0, stderr


def test_a_run_file_names_them(dynaip, tiny, files, tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(dict(model=str(tiny[0]), lora=[f"{files[0]}=0.5", str(files[1])])))
    run = ("--options", tmp_path / "run.yaml", "--prompt", "a cat", *SMALL)
    status, _, stderr = dynaip("sample", *run, "--output", tmp_path / "a.png")
    assert status == 0, stderr
    assert read_settings(tmp_path / "a.png")["lora_scale"] == [0.5, 1.0]


def test_words_of_a_textual_inversion_are_told(dynaip, tiny, tmp_path):
    path = lora(tmp_path / "a.safetensors", **{"bundle_emb.my.t5": np.zeros((1, 32), np.float32)})
    words = ("--model", tiny[0], "--prompt", "a cat", "--output", tmp_path / "a.png", *SMALL)
    status, _, stderr = dynaip("sample", *words, "--lora", path)
    assert status == 0 and f"warning: --lora {path}: the words of its textual inversion (my) are not used" in stderr
    with pytest.warns(UserWarning, match=r"textual inversion \(my\)"):
        DynaIPPipeline.load(tiny[0], loras=path)


@pytest.mark.parametrize(
    "text, expected",
    [("a.safetensors", ("a.safetensors", 1.0)), ("a=b.safetensors", ("a=b.safetensors", 1.0)), ("a=b=-0.5", ("a=b", -0.5)), ("a=1e-1", ("a", 0.1))],
)  # fmt: skip
def test_a_scale_stands_behind_the_last_sign(text, expected):
    assert loras.parse(text) == expected


def test_bad_files_and_scales_get_one_line(dynaip, tiny, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"PK")
    (tmp_path / "html.safetensors").write_text("<html>gated</html>")
    (tmp_path / "empty").mkdir()
    nan = lora(tmp_path / "nan.safetensors", **{"lora_unet_img_in.diff": np.full((64, 64), np.nan, np.float32)})
    whole = lora(tmp_path / "int.safetensors", **{"lora_unet_img_in.diff": np.zeros((64, 64), np.int8)})
    for given, said in (
        (tmp_path / "none.safetensors", "no such file; expected a LoRA in safetensors"),
        (tmp_path / "x.bin", "a pickle by its name; expected safetensors"),
        (tmp_path / "html.safetensors", "not a whole safetensors file"),
        (tmp_path / "empty", "a folder with 0 of adapter_model.safetensors"),
        (f"{nan}=nan", "scale nan; expected a number"),
        (f"{nan}=1e9", "scale 1000000000.0; expected a number of at most 1000"),
        (nan, "lora_unet_img_in.diff holds NaN or infinity"),
        (whole, "lora_unet_img_in.diff holds int8; expected floats"),
    ):
        words = ("--model", tiny[0], "--prompt", "a cat", "--output", tmp_path / "a.png", *SMALL)
        status, stdout, stderr = dynaip("sample", *words, "--lora", given)
        assert status == 2 and not stdout and said in stderr, stderr
        assert len(stderr.splitlines()[-1]) <= 310 and "Traceback" not in stderr and not (tmp_path / "a.png").exists()
    for bad in (3, [3], [("a", "b")], [("a", None)], [""]):
        with pytest.raises(UserError, match="`loras`"):
            DynaIPPipeline.load(tiny[0], loras=bad)
    with pytest.raises(UserError, match="`loras`: 65 files; expected at most 64"):
        DynaIPPipeline.load(tiny[0], loras=["a"] * 65)
