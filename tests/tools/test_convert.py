"""The converter's command line: single files, what goes together, and what bad sources get."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dynaip_jax.commandline import run_cli
from dynaip_jax.families.registry import FAMILIES
from dynaip_jax.models.clip import CLIPVisionConfig
from dynaip_jax.models.flux import FluxConfig
from dynaip_jax.models.vae import VAEConfig
from dynaip_jax.storage.bundle import Bundle
from tools.convert_torch_weights import clip, engine, flux, vae
from tools.convert_torch_weights.__main__ import main

COMPONENTS = FAMILIES["flux"].components
HEAD = FluxConfig(
    in_channels=64, out_channels=64, vec_in_dim=24, context_in_dim=20, hidden_size=128, num_heads=1, depth=1, depth_single_blocks=2
)  # fmt: skip


def convert(*words):
    return run_cli(main, [str(w) for w in words])


def random_tensors(table, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s).astype(dtype) for n, s in engine.source_shapes(table).items()}


@pytest.fixture
def single_files(tmp_path):
    """flux.safetensors with the community prefix, in bfloat16, and ae.safetensors, both in BFL's layout."""
    import ml_dtypes

    tensors = random_tensors(flux.table(HEAD, "bfl"), ml_dtypes.bfloat16)
    save_file({f"model.diffusion_model.{n}": x for n, x in tensors.items()}, tmp_path / "flux.safetensors")
    save_file(random_tensors(vae.table(VAEConfig.tiny(), "bfl")), tmp_path / "ae.safetensors")
    return tmp_path / "flux.safetensors", tmp_path / "ae.safetensors"


def test_single_files_keep_their_values_and_precision(single_files, tmp_path, capsys):
    transformer, ae = single_files
    assert convert("--source", transformer, "--source", ae, "--out", tmp_path / "b") == 0
    bundle = Bundle.open(tmp_path / "b", FAMILIES)
    config = bundle.config("transformer", FluxConfig)
    assert config == HEAD
    assert bundle.manifest["components"]["transformer"]["dtype"] == "bfloat16"
    stored = bundle.load("transformer", COMPONENTS["transformer"].abstract(config))
    source = {
        n.removeprefix("model.diffusion_model."): np.asarray(x, np.float32) for n, x in load_file(transformer).items()
    }
    jax.tree.map(np.testing.assert_array_equal, stored, flux.params_from_torch(source, config))
    assert bundle.config("vae", VAEConfig).ch_mult == VAEConfig.tiny().ch_mult
    assert convert("--source", transformer, "--out", tmp_path / "f", "--dtype", "float32") == 0
    as_float32 = Bundle.open(tmp_path / "f", FAMILIES)
    assert as_float32.manifest["components"]["transformer"]["dtype"] == "float32"
    assert as_float32.fingerprint == bundle.fingerprint
    capsys.readouterr()


def test_a_bundle_that_lacks_parts_says_so(single_files, tmp_path, dynaip):
    assert convert("--source", single_files[0], "--out", tmp_path / "b") == 0
    status, _, stderr = dynaip("sample", "--model", tmp_path / "b", "--prompt", "x", "--output", tmp_path / "o.png")
    assert status == 2 and "has no vae (only transformer)" in stderr and "--source" in stderr


def test_a_tower_for_reference_images_alone(tmp_path, capsys):
    config = CLIPVisionConfig.tiny(hidden_size=64, num_attention_heads=1)
    save_file(random_tensors(clip.vision_table(config)), tmp_path / "clip.safetensors")
    assert convert("--clip-vision", tmp_path / "clip.safetensors", "--out", tmp_path / "b") == 0
    assert set(Bundle.open(tmp_path / "b", FAMILIES).manifest["components"]) == {"clip_vision"}
    assert "the sources lack transformer" in capsys.readouterr().err
    assert convert("--out", tmp_path / "c") == 2 and not (tmp_path / "c").exists()
    assert "--source: no value given; expected at least one, or --clip-vision" in capsys.readouterr().err


def test_blocks_of_two_precisions_have_the_one_that_holds_both(single_files, tmp_path):
    tensors = load_file(single_files[0])
    name = "model.diffusion_model.single_blocks.1.linear2.bias"
    save_file(tensors | {name: np.full(tensors[name].shape, 1 / 3, np.float32)}, tmp_path / "mixed.safetensors")
    assert convert("--source", tmp_path / "mixed.safetensors", "--out", tmp_path / "b") == 0
    bundle = Bundle.open(tmp_path / "b", FAMILIES)
    stored = bundle.load("transformer", COMPONENTS["transformer"].abstract(HEAD))["single_blocks"]["mlp_out"]["bias"]
    assert stored.dtype == np.float32 and (np.asarray(stored[1]) == np.float32(1 / 3)).all()
    before = tensors["model.diffusion_model.single_blocks.0.linear2.bias"]
    np.testing.assert_array_equal(np.asarray(stored[0]), before.astype(np.float32))
    zarr = lambda leaf: json.loads((tmp_path / "b" / "transformer" / leaf / ".zarray").read_text())["dtype"]
    assert (zarr("single_blocks.mlp_out.bias"), zarr("single_blocks.mlp_out.kernel")) == ("<f4", "bfloat16")


def test_the_sizes_of_the_tiny_default_are_read_back(tiny):
    bundle = Bundle.open(tiny[0], FAMILIES)
    for name, component in COMPONENTS.items():
        assert bundle.config(name, component.config).__class__ is component.config


def test_bad_sources_get_one_line_and_leave_nothing(single_files, tmp_path, capsys):
    transformer, ae = single_files
    faults = tmp_path / "faults"
    faults.mkdir()
    whole = transformer.read_bytes()
    (faults / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (faults / "text.safetensors").write_text("hello")
    tensors = load_file(transformer)
    first = "model.diffusion_model.img_in.weight"
    save_file({n: x for n, x in tensors.items() if n != first}, faults / "short.safetensors")
    save_file(tensors | {"surplus": np.zeros(2, np.float32)}, faults / "long.safetensors")
    save_file(tensors | {first: (tensors[first] * np.nan).astype(tensors[first].dtype)}, faults / "nan.safetensors")
    save_file({"unet.weight": np.zeros(2, np.float32)}, faults / "unet.safetensors")
    (faults / "other").mkdir()
    (faults / "other" / "model_index.json").write_text(json.dumps(dict(_class_name="StableDiffusion3Pipeline")))
    (faults / "nothing").mkdir()
    (faults / "pickled").mkdir()
    (faults / "pickled" / "config.json").write_text(
        json.dumps(dict(model_type="clip_vision_model", hidden_size=32, num_attention_heads=4))
    )
    (faults / "pickled" / "pytorch_model.bin").write_bytes(b"\x80x")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("mine")
    cases = [
        (("--source", faults / "none.safetensors"), "no such file"),
        (("--source", faults / "half.safetensors"), "not a whole safetensors file"),
        (("--source", faults / "text.safetensors"), "not a whole safetensors file"),
        (("--source", faults / "short.safetensors"), "img_in.weight is missing"),
        (("--source", faults / "long.safetensors"), r"1 unexpected: surplus \[2\]"),
        (("--source", faults / "nan.safetensors"), "img_in.weight holds NaN"),
        (("--source", faults / "unet.safetensors"), "neither BFL's tensor names"),
        (("--source", faults / "other"), "unknown family 'StableDiffusion3Pipeline'; expected FluxPipeline"),
        (("--source", faults / "nothing"), "model_index.json: missing"),
        (("--source", ae, "--clip-vision", faults / "nowhere"), "--clip-vision .*no such folder"),
        (
            ("--source", ae, "--clip-vision", faults / "pickled"),
            "is no whole file of weights|is a pickle that holds more than weights",
        ),
        (("--source", ae, "--t5-length", 0), "--t5-length 0"),
        (("--source", ae, "--dtype", "int8"), "int8"),
        (("--source", ae, "--out", kept), "already exists"),
        (("--source", ae, "--out", kept, "--overwrite"), "holds something else"),
        ((), "--source"),
    ]
    for words, expected in cases:
        out = () if "--out" in words else ("--out", tmp_path / "b")
        status = convert(*words, *out)
        stderr = capsys.readouterr().err
        lines = [line for line in stderr.splitlines() if not line.endswith(": converting")]
        assert status == 2 and len(lines) == 1, (words, stderr)

        assert re.search(expected, lines[0]), (expected, lines[0])
        assert not (tmp_path / "b").exists() and [p.name for p in kept.iterdir()] == ["thesis.txt"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_overwrite_replaces_a_bundle_whole(single_files, tmp_path, capsys):
    out = tmp_path / "b"
    assert convert("--source", single_files[0], "--out", out) == 0
    assert convert("--source", single_files[1], "--out", out) == 2
    assert (out / "transformer").is_dir() and "pass --overwrite" in capsys.readouterr().err
    assert convert("--source", single_files[1], "--out", out, "--overwrite") == 0
    assert sorted(p.name for p in out.iterdir()) == ["bundle.json", "vae"]
