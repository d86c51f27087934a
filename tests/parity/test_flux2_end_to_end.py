"""diffusers' own picture of a FLUX.2 [klein], from a folder it saved, through our converter and our command line, with injected noise.

Tolerance: 2 of 255 grey levels in any pixel; what is seen is at most 1, where float32 rounding tips an 8-bit one.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from dynaip_jax.app import main as cli
from dynaip_jax.commandline import run_cli
from dynaip_jax.images.files import read_settings
from dynaip_jax.models.flux2 import Flux2Config
from tests.parity.flux2_folder import klein_pipeline
from tests.parity.flux_folder import save_clip_vision
from tools.convert_torch_weights import engine
from tools.convert_torch_weights import flux2 as convert_flux2
from tools.convert_torch_weights import flux2_vae as convert_vae
from tools.convert_torch_weights.__main__ import main as convert
from train.export import main as export
from train.main import main as train
from train.prepare import main as prepare

PROMPT = "a cat on a red sofa, at dawn."
BASE, DISTILLED = False, True


def convert_folder(*words):
    return run_cli(convert, [str(w) for w in words])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Distilled? -> (diffusers pipeline, bundle folder), made once."""
    made = {}

    def make(distilled):
        if distilled not in made:
            folder = tmp_path_factory.mktemp("model")
            pipe = klein_pipeline(distilled)
            pipe.set_progress_bar_config(disable=True)
            pipe.save_pretrained(folder / "klein", max_shard_size="200KB")
            save_clip_vision(folder / "clip")
            source = ("--source", folder / "klein", "--clip-vision", folder / "clip")
            assert convert_folder(*source, "--out", folder / "bundle") == 0
            made[distilled] = pipe, folder / "bundle"
        return made[distilled]

    return make


@pytest.mark.parametrize(
    ("kind", "height", "width", "batch", "steps", "scale", "references"),
    [
        (DISTILLED, 64, 48, 1, None, None, []),
        (BASE, 64, 96, 2, 12, None, []),
        (BASE, 64, 48, 1, 4, 1.0, []),
        (DISTILLED, 64, 48, 1, None, None, [(70, 90)]),
        (BASE, 64, 48, 1, 4, None, [(70, 90), (64, 80)]),
    ],
    ids=["distilled, 4 steps", "base, CFG, 12 steps", "base without CFG", "one reference", "two references, CFG"],
)
def test_picture_of_diffusers(models, tmp_path, kind, height, width, batch, steps, scale, references):
    pipe, bundle = models(kind)
    noise = np.random.default_rng(5).normal(size=(batch, 128, height // 16, width // 16)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    files = [tmp_path / f"reference_{n}.png" for n in range(len(references))]
    for n, file in enumerate(files):
        smooth = np.random.default_rng(n).integers(0, 255, (4, 5, 3), np.uint8)
        Image.fromarray(smooth).resize(references[n], Image.Resampling.BICUBIC).save(file)
    asked = dict(
        prompt=PROMPT,
        height=height,
        width=width,
        num_inference_steps=steps or 4,
        num_images_per_prompt=batch,
        guidance_scale=4.0 if scale is None else scale,
        latents=torch.tensor(noise),
        output_type="np",
    )
    theirs = pipe(image=[Image.open(file) for file in files] or None, **asked).images
    if files:  # they count for much more than what is tolerated
        assert np.abs(theirs - pipe(**asked).images).max() * 255 > 15

    out = tmp_path / "out.png"
    command = f"--model {bundle} --height {height} --width {width} --noise {tmp_path}/noise.npy --output {out}".split()
    command += ["--prompt", PROMPT, *(f"--native-reference={file}" for file in files)]
    command += [] if steps is None else ["--steps", str(steps)]
    command += [] if scale is None else ["--true-cfg", str(scale)]
    assert run_cli(cli.run, ["sample", *command]) == 0

    drawn = [out] if batch == 1 else [tmp_path / f"out_{k}.png" for k in range(batch)]
    ours = np.stack([np.asarray(Image.open(f)) for f in drawn]).astype(int)
    expected = np.round(theirs * 255).astype(int)
    assert ours.shape == expected.shape and expected.std() > 10
    assert np.abs(ours - expected).max() <= 2
    settings = read_settings(drawn[0])
    assert settings["prompt"] == PROMPT and settings["steps"] == (steps or 4)
    assert settings.get("native_reference", []) == [str(file) for file in files]


RECIPE = Path(__file__).parents[2] / "configs" / "flux2_klein_512.py"
SMALL = """--data.resolution 64 --data.aspects 1:1 --data.clip-size 32 --data.workers 0 --adapter.levels 2 3 4 --adapter.expert-width 64 --batch 2
    --steps 2 --save-every 2 --sample.every 2 --sample.size 32 --sample.steps 1 --sample.rows 1 --dtype float32 --remat none"""


def test_commands_of_the_readme(models, tmp_path, photograph, capsys):
    """The recipe on a converted model: prepared, trained, exported; drawn with the model's own references, the adapter, and both."""
    bundle = models(BASE)[1]
    row = dict(reference=str(photograph), target=str(photograph), caption="a cup", subject="cup")
    (tmp_path / "metadata.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    run, data, adapter = tmp_path / "run", tmp_path / "data", tmp_path / "adapter"
    for command, words in (
        (prepare, f"--source {tmp_path}/metadata.jsonl --out {data}"),
        (train, f"--config {RECIPE} --workdir {run} --bundle {bundle} --data.path {data} {SMALL}"),
        (export, f"--workdir {run} --out {adapter}"),
    ):
        assert run_cli(command, words.split()) == 0, capsys.readouterr().err
    assert (run / "samples" / "step_000002.png").exists()
    assert json.loads((adapter / "adapter.json").read_text())["config"]["blocks"] == "all"

    drawn = {}
    own, injected = (
        f"--native-reference {photograph}".split(),
        f"--adapter {adapter} --reference {photograph}".split(),
    )
    for name, words in (("plain", []), ("own", own), ("injected", injected), ("both", own + injected)):
        out = tmp_path / f"{name}.png"
        size = "--height 32 --width 48 --steps 2 --prompt cup".split()
        assert run_cli(cli.run, ["sample", "--model", str(bundle), "--output", str(out), *size, *words]) == 0
        drawn[name] = np.asarray(Image.open(out)).astype(int)
    assert np.abs(drawn["own"] - drawn["plain"]).max() > 15
    assert np.abs(drawn["both"] - drawn["own"]).max() <= 1  # after two steps the adapter adds next to nothing


def test_bundle_says_where_it_came_from(models):
    for kind, defaults in ((DISTILLED, dict(steps=4)), (BASE, dict(steps=50, true_cfg=4.0))):
        pipe, bundle = models(kind)
        manifest = json.loads((bundle / "bundle.json").read_text())
        assert manifest["family"] == "flux2" and manifest["text"] == dict(qwen3_length=512)
        assert manifest["defaults"] == defaults | dict(guidance=None, height=1024, width=1024)
        parameters = sum(p.numel() for p in pipe.transformer.parameters())
        assert manifest["components"]["transformer"]["parameters"] == parameters
        folder = bundle.parent
        source = ("--source", folder / "klein", "--clip-vision", folder / "clip", "--out", bundle)
        assert convert_folder(*source, "--verify") == 0


def test_single_files_of_bfl_replace_parts_of_a_folder(models, tmp_path, capsys):
    """A transformer and an autoencoder in BFL's names; parts of another family are refused, and so is a changed scheduler."""
    pipe, bundle = models(BASE)
    klein = bundle.parent / "klein"
    vae = json.loads((klein / "vae" / "config.json").read_text())
    table = convert_vae.table(convert_vae.config_from_diffusers(vae), "bfl")
    rng = np.random.default_rng(0)
    random = {n: rng.normal(size=s).astype(np.float32) for n, s in engine.source_shapes(table).items()}
    save_file(random | {"bn.num_batches_tracked": np.array(3)}, tmp_path / "ae.safetensors")
    config = Flux2Config(context_in_dim=48, hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1, mlp_ratio=1.0)
    shapes = engine.source_shapes(convert_flux2.table(config, "bfl"))
    save_file({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}, tmp_path / "klein.safetensors")
    sources = ("--source", klein, "--source", tmp_path / "ae.safetensors", "--source", tmp_path / "klein.safetensors")
    assert convert_folder(*sources, "--out", tmp_path / "bundle", "--t5-length", 64) == 0
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert manifest["components"]["transformer"]["config"]["hidden_size"] == 128
    assert manifest["components"]["vae"]["provenance"][0]["file"] == "ae.safetensors"
    assert manifest["text"] == dict(qwen3_length=64)
    capsys.readouterr()

    save_file({"img_in.weight": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    assert convert_folder("--source", klein, "--source", tmp_path / "other.safetensors", "--out", tmp_path / "b") == 2
    assert "missing" in capsys.readouterr().err
    shard = next((klein / "transformer").glob("*-00001-of-*.safetensors"))
    save_file(load_file(shard) | {"single_stream_modulation.linear.weight": np.zeros(2)}, tmp_path / "d.safetensors")
    assert convert_folder("--source", tmp_path / "d.safetensors", "--out", tmp_path / "b") == 2
    assert "model_index.json" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_relatives_are_refused_by_their_names(models, tmp_path, capsys):
    """[dev], as a folder and as a transformer alone, and [klein] 9B-KV."""
    dev = Flux2Config(
        context_in_dim=48,
        hidden_size=128,
        num_heads=1,
        depth=1,
        depth_single_blocks=1,
        mlp_ratio=1.0,
        guidance_embed=True,
    )
    shapes = engine.source_shapes(convert_flux2.table(dev, "bfl"))
    save_file({n: np.zeros(s, np.float32) for n, s in shapes.items()}, tmp_path / "flux2-dev.safetensors")
    refused = [
        (("--source", models(BASE)[1].parent / "klein", "--source", tmp_path / "flux2-dev.safetensors"), "[dev]")
    ]
    for kind, what in (("Flux2Pipeline", "[dev]"), ("Flux2KleinKVPipeline", "[klein] 9B-KV")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "model_index.json").write_text(json.dumps(dict(_class_name=kind)))
        refused.append((("--source", tmp_path / kind), what))
    capsys.readouterr()
    for source, what in refused:
        assert convert_folder(*source, "--out", tmp_path / "b") == 2
        told = capsys.readouterr().err
        assert f"FLUX.2 {what}" in told and "; expected" in told and told.count("\n") == 1


def test_another_schedule_is_refused(models, tmp_path, capsys):
    pipe, bundle = models(BASE)
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    klein = tmp_path / "klein"
    klein.mkdir()
    for part in (bundle.parent / "klein").iterdir():
        if part.name != "scheduler":
            (klein / part.name).symlink_to(part)
    (klein / "scheduler").mkdir()
    settings = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    for name, value in (("use_dynamic_shifting", False), ("shift_terminal", 0.1)):
        (klein / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings | {name: value}))
        assert convert_folder("--source", klein, "--out", tmp_path / "b", "--dry-run") == 2
        assert f"{name} {value!r}; expected" in capsys.readouterr().err
