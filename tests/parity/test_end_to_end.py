"""diffusers' own picture, from a folder it saved, through our converter and our command line, with injected noise.

Tolerance: 2 of 255 grey levels in any pixel; what is seen is at most 1, where float32 rounding tips an 8-bit one.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from dynaip_jax.app import main as cli
from dynaip_jax.commandline import run_cli
from dynaip_jax.images.files import read_settings
from tests.parity.flux_folder import flux_pipeline, save_clip_vision
from tools.convert_torch_weights.__main__ import main as convert

PROMPT = "a cat on a red sofa, at dawn."


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def model(request, tmp_path_factory):
    """(diffusers pipeline, bundle folder, is it dev)"""
    folder = tmp_path_factory.mktemp("model")
    pipe = flux_pipeline(request.param)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "flux", max_shard_size="200KB")
    assert (folder / "flux/transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    save_clip_vision(folder / "clip")
    assert (
        run_cli(convert, ["--source", f"{folder}/flux", "--clip-vision", f"{folder}/clip", "--out", f"{folder}/bundle"])
        == 0
    )
    return pipe, folder / "bundle", request.param


@pytest.mark.parametrize(
    ("height", "width", "batch", "negative"), [(64, 64, 1, None), (96, 48, 2, None), (48, 80, 1, "blurry, bad")]
)
def test_picture_of_diffusers(model, tmp_path, height, width, batch, negative):
    pipe, bundle, dev = model
    noise = np.random.default_rng(5).normal(size=(batch, 16, height // 8, width // 8)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    steps = 5 if dev else 4
    options = dict(guidance_scale=2.5) if dev else {}
    if negative is not None:
        options |= dict(negative_prompt=negative, true_cfg_scale=3.0)
    theirs = pipe(
        PROMPT,
        height=height,
        width=width,
        num_inference_steps=steps,
        num_images_per_prompt=batch,
        output_type="np",
        latents=pipe._pack_latents(torch.tensor(noise), batch, 16, height // 8, width // 8),
        max_sequence_length=512 if dev else 256,
        **options,
    ).images

    out = tmp_path / "out.png"
    command = f"--model {bundle} --height {height} --width {width} --noise {tmp_path}/noise.npy --output {out}".split()
    command += ["--prompt", PROMPT, "--steps", str(steps)]
    command += ["--guidance", "2.5"] if dev else []
    command += ["--negative-prompt", negative, "--true-cfg", "3"] if negative is not None else []
    assert run_cli(cli.run, ["sample", *command]) == 0

    files = [out] if batch == 1 else [tmp_path / f"out_{k}.png" for k in range(batch)]
    ours = np.stack([np.asarray(Image.open(f)) for f in files]).astype(int)
    expected = np.round(theirs * 255).astype(int)
    assert ours.shape == expected.shape and expected.std() > 10
    assert np.abs(ours - expected).max() <= 2
    settings = read_settings(files[0])
    assert settings["prompt"] == PROMPT and settings["steps"] == steps and settings["height"] == height


def test_bundle_says_where_it_came_from(model):
    pipe, bundle, dev = model
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert manifest["family"] == "flux" and manifest["defaults"]["steps"] == (28 if dev else 4)
    assert manifest["text"] == dict(t5_length=512 if dev else 256, clip_length=77)
    assert manifest["schedule"]["dynamic"] == dev
    shards = manifest["components"]["transformer"]["provenance"]
    assert len(shards) > 1 and all(len(s["sha256"]) == 64 for s in shards)
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    assert manifest["components"]["transformer"]["parameters"] == parameters


def test_single_files_of_bfl_and_a_replaced_transformer(model, tmp_path, capsys):
    """A finetune as one diffusers-named file needs its folder; the pair folder + folder works, and --dry-run writes nothing."""
    pipe, bundle, dev = model
    flux = bundle.parent / "flux"
    assert run_cli(convert, ["--source", str(flux), "--out", str(tmp_path / "b"), "--dry-run"]) == 0
    assert not (tmp_path / "b").exists() and "nothing written" in capsys.readouterr().out
    shard = next((flux / "transformer").glob("*-00001-of-*.safetensors"))
    assert run_cli(convert, ["--source", str(shard), "--out", str(tmp_path / "b")]) == 2
    assert len(load_file(shard)) > 0 and "convert it from a diffusers folder" in capsys.readouterr().err
