"""The command line: what it writes, and the one line it answers to bad input, with status 2 and nothing written."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from dynaip_jax.app import saving
from dynaip_jax.app.saving import Saving
from dynaip_jax.errors import UserError
from dynaip_jax.images.files import read_settings
from dynaip_jax.sampling import opening, pipeline
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.storage.bundle import Bundle

SMALL = ("--steps", 2, "--height", 32, "--width", 32)


def test_several_images_have_settings_and_a_grid(dynaip, tiny, photograph, tmp_path):
    out = tmp_path / "cup.png"
    status, stdout, stderr = dynaip(
        "sample", "--model", tiny[0], "--adapter", tiny[1], "--prompt", "a cup", "--reference", photograph,
        "--num-images", 3, "--seed", 4, "--granularity", 0, 1, 1, "--merge", "concat", "--output", out, *SMALL,
    )  # fmt: skip
    assert status == 0, stderr
    assert stdout.split() == [str(tmp_path / f"cup_{k}.png") for k in range(3)] + [str(out)]
    assert "coffee.jpg: routing weights low 0.000, mid 0.500, high 0.500" in stderr
    assert Image.open(out).size == (64, 64)
    settings = read_settings(tmp_path / "cup_1.png")
    assert settings["seed"] == 5 and settings["image_scale"] == 1.0 and settings["text_gain"] == 0.0
    assert settings["merge"] == "concat" and settings["fit"] == "pad"
    assert settings["reference"] == [str(photograph)] and settings["steps"] == 2 and settings["guidance"] == 3.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cup.png", "cup_0.png", "cup_1.png", "cup_2.png"]


def test_subjects_have_their_words_in_the_settings(dynaip, tiny, photograph, tmp_path):
    named = shutil.copy(photograph, tmp_path / "a=b.jpg")
    status, _, stderr = dynaip(
        "sample", "--model", tiny[0], "--adapter", tiny[1], "--prompt", "A cup and a red star", "--subject", f"{photograph}=cup",
        "--subject", f"{named}=Red Star", "--output", tmp_path / "o.png", *SMALL,
    )  # fmt: skip
    assert status == 0, stderr
    settings = read_settings(tmp_path / "o.png")
    assert settings["words"] == ["cup", "Red Star"] and settings["regions"] == "auto"
    assert settings["reference"] == [str(photograph), str(named)]


def test_embedded_default_and_noise(dynaip, tmp_path):
    np.save(tmp_path / "n.npy", np.zeros((1, 8, 16, 16), np.float32))
    status, _, stderr = dynaip(
        "sample", "--prompt", "a star on sand", "--noise", tmp_path / "n.npy", "--output", tmp_path / "o.png"
    )
    assert status == 0 and "embedded model of Shapeland" in stderr
    assert read_settings(tmp_path / "o.png")["seed"] is None


@pytest.fixture
def broken(tmp_path, tiny, photograph):
    """Files with one fault each, by name."""
    folder = tmp_path / "faults"
    folder.mkdir()
    files = {name: folder / name for name in (
        "missing.png", "truncated.jpg", "corrupt.png", "text.png", "bomb.png", "black.png", "tall.png", "bad.npy", "flat.npy", "nan.npy",
    )}  # fmt: skip
    files["truncated.jpg"].write_bytes(photograph.read_bytes()[:5000])
    Image.new("RGB", (64, 64)).save(files["corrupt.png"])
    data = bytearray(files["corrupt.png"].read_bytes())
    data[60:70] = b"\xff" * 10
    files["corrupt.png"].write_bytes(data)
    files["text.png"].write_text("not a picture")
    Image.new("1", (20_000, 20_000)).save(files["bomb.png"])
    Image.new("L", (32, 32)).save(files["black.png"])
    Image.new("L", (32, 64), 255).save(files["tall.png"])
    files["bad.npy"].write_bytes(b"no")
    np.save(files["flat.npy"], np.zeros((1, 16, 4, 5), np.float32))
    files["many.npy"] = folder / "many.npy"
    with files["many.npy"].open("wb") as file:
        np.savez(file, np.zeros((1, 16, 4, 4), np.float32))
    np.save(files["nan.npy"], np.full((1, 16, 4, 4), np.nan, np.float32))

    def model(name, change):
        shutil.copytree(tiny[0], folder / name)
        manifest = json.loads((folder / name / "bundle.json").read_text())
        change(manifest, folder / name)
        (folder / name / "bundle.json").write_text(json.dumps(manifest))
        files[name] = folder / name

    model("old", lambda m, _: m.update(format_version=0))
    model("alien", lambda m, _: m.update(family="sd3"))
    model("wide", lambda m, _: m["components"]["clip_vision"]["config"].update(hidden_size=48))
    model("blind", lambda m, _: m["components"].pop("clip_vision"))
    model("unfit", lambda m, _: m["components"]["t5"]["config"].update(d_model=40))
    model("resized", lambda m, _: m["components"]["transformer"]["config"].update(mlp_ratio=2.0))
    model("gone", lambda m, path: shutil.rmtree(path / "vae"))
    model("damaged", lambda m, path: [f.write_bytes(b"x") for f in (path / "vae").rglob("*") if f.is_file()])
    model("mute", lambda m, path: shutil.rmtree(path / "tokenizers" / "clip"))
    shutil.copytree(tiny[0], folder / "nojson")
    (folder / "nojson" / "bundle.json").write_text("{")
    files["nojson"] = folder / "nojson"
    files["empty"], files["tiny"] = folder / "empty", tiny[1]
    files["empty"].mkdir()
    files["diffusers"] = folder / "diffusers"
    files["diffusers"].mkdir()
    (files["diffusers"] / "model_index.json").write_text("{}")

    def adapter(name, change=lambda m: None, tensors=None):
        shutil.copytree(tiny[1], folder / name)
        manifest = json.loads((folder / name / "adapter.json").read_text())
        change(manifest)
        (folder / name / "adapter.json").write_text(json.dumps(manifest))
        files[name] = folder / name
        if tensors:
            path = folder / name / "adapter.safetensors"
            save_file(tensors(load_file(path)), path)

    adapter("stranger", lambda m: m["base"].update(fingerprint="0" * 64))
    adapter("sd3-adapter", lambda m: m["base"].update(family="sd3"))
    adapter("needs-1024", lambda m: m["config"]["hmoe"].update(clip_width=1024))
    adapter("deeper", lambda m: m["config"].update(depth=19))
    adapter("nan-adapter", lambda m: m.pop("checksums"), tensors=lambda t: t | {"double.key": t["double.key"] * np.nan})
    adapter("thin", tensors=lambda t: {k: v for k, v in t.items() if k != "double.key"})
    adapter("half")
    whole = (folder / "half" / "adapter.safetensors").read_bytes()
    (folder / "half" / "adapter.safetensors").write_bytes(whole[: len(whole) // 2])
    return files


CASES = {
    # name: (options after the good ones, what the line must say); {x} is a broken file, {good} a photograph
    "no reference file": ("--reference {missing.png}", "missing.png"),
    "truncated picture": ("--reference {truncated.jpg}", "truncated.jpg"),
    "corrupt picture": ("--reference {corrupt.png}", "corrupt.png"),
    "not a picture": ("--reference {text.png}", "text.png"),
    "decompression bomb": ("--reference {bomb.png}", "400000000|400,000,000"),
    "more masks than references": ("--reference {good} --mask {tall.png} --mask {tall.png}", "2 masks for 1 references"),
    "mask of another shape": ("--reference {good} --mask {tall.png}", "32 x 64.*32 x 32"),
    "black mask": ("--reference {good} --mask {black.png}", "black everywhere"),
    "mask without reference": ("--mask {tall.png}", "--mask: needs a reference"),
    "scale without reference": ("--image-scale 0.5", "--image-scale: needs a reference"),
    "zero gain without reference": ("--text-gain 0", "--text-gain: needs a reference"),
    "merge without reference": ("--merge sum", "--merge: needs a reference"),
    "merge": ("--reference {good} --merge mean", "--merge.*mean.*sum"),
    "regions without reference": ("--regions none", "--regions: needs a reference"),
    "regions": ("--reference {good} --regions all", "--regions.*all.*auto"),
    "regions without words": ("--reference {good} --regions auto", "--regions auto: 0 of 1 references.*--subject IMG=WORDS"),
    "words for some": ("--reference {good} --subject {good}=cup", "--regions auto: 1 of 2 references"),
    "subject without words": ("--subject {good}=", "--subject .*coffee.jpg=: expected IMG=WORDS"),
    "subject without picture": ("--subject cup", "--subject cup: expected IMG=WORDS"),
    "subject's picture": ("--subject {missing.png}=cup", "missing.png: no such file"),
    "words not in the prompt": ("--reference {good} --regions none --subject {good}=tea", "its words 'tea' are not in the prompt"),
    "words in another word": ("--subject {good}=cu", "its words 'cu' are not in the prompt"),
    "the same words twice": ("--subject {good}=cup --subject {good}=CUP", "'CUP' stand in the prompt 1 time"),
    "height": ("--height 40", "--height 40.*multiple of 16"),
    "width": ("--width -16", "--width -16.*positive multiple of 16"),
    "no steps": ("--steps 0", "--steps 0"),
    "not a number": ("--steps many", "--steps.*many.*see dynaip sample --help"),
    "unknown option": ("--stepz 3", "--stepz"),
    "seed": ("--seed -1", "--seed -1"),
    "no images": ("--num-images 0", "--num-images 0"),
    "negative granularity": ("--reference {good} --granularity 1 -1 0", "--granularity.*non-negative"),
    "zero granularity": ("--reference {good} --granularity 0 0 0", "not all zero"),
    "window": ("--reference {good} --image-start 0.8 --image-end 0.2", "--image-start 0.8 --image-end 0.2"),
    "scale": ("--reference {good} --image-scale nan", "--image-scale nan"),
    "cfg alone": ("--true-cfg 3", "--true-cfg 3.*--negative-prompt"),
    "noise file": ("--noise {bad.npy}", "bad.npy"),
    "noise shape": ("--noise {flat.npy}", r"\[1, 16, 4, 5\].*\[b, 16, 4, 4\]"),
    "noise archive": ("--noise {many.npy}", "many.npy: cannot be read as a NumPy array .no .npy file: an .npz archive of several arrays.; expected a .npy file"),
    "noise nan": ("--noise {nan.npy}", "--noise: holds NaN"),
    "noise and seed": ("--noise {nan.npy} --seed 3", "--noise.*--seed"),
    "output name": ("--output {empty}/x.jpg", "expected .png"),
    "output folder": ("--output {empty}/no/x.png", "no folder"),
    "model missing": ("--model {missing.png}", "--model .*missing.png: no such folder"),
    "model empty": ("--model {empty}", "no bundle.json"),
    "model is diffusers": ("--model {diffusers}", "convert it: python -m tools.convert_torch_weights"),
    "model json": ("--model {nojson}", "bundle.json: not readable as JSON"),
    "model version": ("--model {old}", "format version 0.*reads version 1"),
    "model family": ("--model {alien}", "unknown family 'sd3'.*flux"),
    "model parts": ("--model {unfit}", "t5 width is 40, the transformer takes 32"),
    "model config": ("--model {resized}", "do not fit the config"),
    "model without vae": ("--model {gone}", "vae: missing"),
    "model damaged": ("--model {damaged}", "damaged/vae/.*: damaged or changed, its sha256 is not the one in bundle.json"),
    "model without tokenizer": ("--model {mute}", "mute/tokenizers: cannot be compared with bundle.json .a file is missing"),
    "adapter without reference": ("--adapter {tiny}", "no reference picture"),
    "adapter of another base": ("--reference {good} --adapter {stranger}", "another base.*--any-base"),
    "adapter of another family": ("--reference {good} --adapter {sd3-adapter}", "family 'sd3'"),
    "adapter for a wider clip": ("--reference {good} --adapter {needs-1024}", "width 1024.*clip-vit-large-patch14.*width 32"),
    "adapter for more blocks": ("--reference {good} --adapter {deeper}", "depth 19; the model has 2"),
    "adapter with nan": ("--reference {good} --adapter {nan-adapter}", "double.key holds NaN"),
    "adapter tensor missing": ("--reference {good} --adapter {thin}", "double.key: found None"),
    "adapter truncated": ("--reference {good} --adapter {half}", "not a whole safetensors file"),
    "clip of another width": ("--reference {good} --adapter {needs-1024} --model {wide}", "width 1024"),
    "any base without adapter": ("--any-base", "--any-base: no adapter to accept; pass --adapter DIR"),
    "prompt that is not UTF-8": ("--prompt a\udce9", "--prompt 2: not UTF-8 from character 2 on"),
    "mask that is missing": ("--reference {good} --mask {missing.png}", "missing.png: no such file"),
    "mask that is a folder": ("--reference {good} --mask {empty}", "empty: a folder; expected a picture"),
    "reference by address": ("--reference https://example.com/a.png", "example.com/a.png: an address, not a file.*download it"),
    "no clip in the model": ("--reference {good} --adapter {stranger} --any-base --model {blind}", "no clip_vision.*--clip-vision"),
    "reference without adapter": ("--reference {good}", "--adapter DIR"),
}  # fmt: skip


def test_bad_input_gets_one_line_and_leaves_nothing(dynaip, broken, tiny, photograph, tmp_path):
    """All cases in one test: the broken files are made once."""
    out = tmp_path / "out"
    out.mkdir()
    failures = []
    for name, (words, expected) in CASES.items():
        options = [_fill(w, broken, photograph) for w in words.split()]
        given = ["--model", tiny[0], "--prompt", "a cup", "--output", out / "o.png", *SMALL]
        if (
            {"--reference", "--subject"} & set(options)
            and "--adapter" not in options
            and name != "reference without adapter"
        ):
            given += ["--adapter", tiny[1]]
        status, stdout, stderr = dynaip("sample", *given, *options)
        lines = stderr.strip().splitlines()
        good = status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and re.search(expected, lines[0])
        if not good or stdout or list(out.iterdir()):
            failures.append(f"{name}: status {status}, stderr {stderr!r}, files {list(out.iterdir())}")
        for left in out.iterdir():
            left.unlink()
    assert not failures, "\n".join(failures)


def _fill(word, broken, photograph):
    word = word.replace("{good}", str(photograph))
    for name, path in broken.items():
        word = word.replace("{" + name + "}", str(path))
    return word


def test_existing_pictures_are_kept_unless_told(dynaip, tiny, tmp_path):
    out = tmp_path / "o.png"
    (tmp_path / "o_1.png").write_text("mine")
    command = ("sample", "--model", tiny[0], "--prompt", "x", "--prompt", "y", "--output", out, *SMALL)
    started = time.perf_counter()
    status, _, stderr = dynaip(*command)
    assert status == 2 and "o_1.png: exists already" in stderr and "--overwrite" in stderr
    assert time.perf_counter() - started < 1  # before any work
    assert (tmp_path / "o_1.png").read_text() == "mine" and not out.exists()
    assert dynaip(*command, "--overwrite")[0] == 0
    assert Image.open(tmp_path / "o_1.png").size == (32, 32)
    drawn = [read_settings(tmp_path / name) for name in ("o_0.png", "o_1.png", "o.png")]
    assert [s["prompt"] for s in drawn] == ["x", "y", ["x", "y"]]


def test_long_prompt_warns_and_draws(dynaip, tiny, tmp_path):
    status, _, stderr = dynaip(
        "sample", "--model", tiny[0], "--prompt", "y" * 75 + "tail", "--output", tmp_path / "o.png", *SMALL
    )
    assert status == 0 and stderr == "warning: prompt: the CLIP encoder takes no more; it does not see: 'tail'\n"


def test_what_changes_nothing_is_told_by_flags(dynaip, tiny, photograph, tmp_path):
    status, _, stderr = dynaip(
        "sample", "--model", tiny[0], "--adapter", tiny[1], "--prompt", "a cup", "--subject", f"{photograph}=cup", "--image-start", "0.7",
        "--merge", "sum", "--output", tmp_path / "o.png", *SMALL,
    )  # fmt: skip
    lines = [line for line in stderr.splitlines() if line.startswith("warning: ")]
    assert status == 0 and [line.split()[1] for line in lines] == ["--subject", "--merge", "--image-start"]
    assert "one subject alone" in lines[0] and "--mask would give it a place" in lines[0]


def test_any_base_is_an_answer_to_a_foreign_fingerprint(dynaip, broken, tiny, photograph, tmp_path):
    status, _, stderr = dynaip(
        "sample", "--model", tiny[0], "--adapter", broken["stranger"], "--any-base", "--prompt", "x", "--reference", photograph,
        "--output", tmp_path / "o.png", *SMALL,
    )  # fmt: skip
    assert status == 0, stderr


EARLY = (
    "--steps 0", "--height 63", "--seed -1", "--num-images 0", "--num-images 1000000000", "--image-scale nan",
    "--granularity 0 0 0", "--image-start 1", "--mask {missing.png}", "--mask {tall.png} --mask {tall.png}",
    "--regions none --subject {good}=fish", "--cache-threshold -1", "--true-cfg inf", "--guidance 1e38", "--noise {nan.npy}",
    "--mesh tensor=99", "--output {empty}/no/x.png", "--output {empty}/x.png/", "--at-once 0",
)  # fmt: skip


def test_what_cannot_be_is_known_before_weights_are_read(dynaip, broken, tiny, photograph, tmp_path, monkeypatch):
    monkeypatch.setattr(Bundle, "load", lambda *_, **__: pytest.fail("weights were read"))
    given = ["--model", tiny[0], "--adapter", tiny[1], "--prompt", "a cup", "--output", tmp_path / "o.png", *SMALL]
    for words in EARLY:
        options = [_fill(word, broken, photograph) for word in words.split()]
        status, _, stderr = dynaip("sample", *given, "--reference", photograph, *options)
        assert (status, len(stderr.splitlines())) == (2, 1) and options[0] in stderr + words, f"{words}: {stderr}"


def test_pictures_are_saved_as_they_are_done(dynaip, tiny, tmp_path, monkeypatch):
    """The second part fails; the first is there, and named."""
    made, generate = [], pipeline.generate

    def once(*args):
        if made:
            raise UserError("no more")
        made.append(1)
        return generate(*args)

    monkeypatch.setattr(pipeline, "generate", once)
    options = ("--prompt", "a cup", "--num-images", 3, "--at-once", 2, *SMALL)
    status, stdout, stderr = dynaip("sample", "--model", tiny[0], "--output", tmp_path / "o.png", *options)
    assert (status, stderr) == (2, "error: no more\n")
    assert stdout.split() == [str(tmp_path / f"o_{k}.png") for k in range(2)]
    assert [read_settings(tmp_path / f"o_{k}.png")["seed"] for k in range(2)] == [0, 1]


def test_pictures_that_cannot_be_written_where_they_should_lie_elsewhere(dynaip, tiny, tmp_path, monkeypatch):
    """Another process takes one of the names while the pictures are made."""
    read = opening.Opened.read

    def late(opened):
        (tmp_path / "o_1.png").write_text("another's")
        return read(opened)

    monkeypatch.setattr(opening.Opened, "read", late)
    options = ("--prompt", "a cup", "--num-images", 2, *SMALL)
    status, stdout, stderr = dynaip("sample", "--model", tiny[0], "--output", tmp_path / "o.png", *options)
    assert status == 1 and [name.rpartition("/")[2] for name in stdout.split()] == ["o_0.png", "o_1-1.png", "o.png"]
    assert re.fullmatch(
        r"warning: .*/o_1.png: cannot be written \(.*exists already.*\); saved as .*/o_1-1.png\n", stderr
    )
    assert (tmp_path / "o_1.png").read_text() == "another's" and read_settings(tmp_path / "o_1-1.png")["seed"] == 1


def test_nobody_needs_to_read_the_names(tiny, tmp_path):
    """As with `| head -1`: the pipe is closed after the first name."""
    command = [sys.executable, "-m", "dynaip_jax.app.main", "sample", "--model", tiny[0], "--prompt", "a cup", *SMALL]
    options = ["--num-images", 3, "--output", tmp_path / "o.png"]
    with subprocess.Popen(
        [*map(str, command + options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as made:
        made.stdout.close()
        error = made.stderr.read()
    assert made.returncode == 0 and "Error" not in error and "Exception" not in error, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.png", "o_0.png", "o_1.png", "o_2.png"]


DENOISING = """
import sys
from dynaip_jax.app import main
from dynaip_jax.runtime import layouts

run = layouts.Arranged.run

def told(*args):
    print("denoising", flush=True)
    return run(*args)

layouts.Arranged.run = told
sys.exit(main.main())
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_denoising(tiny, tmp_path, number, status):
    """Thousands of steps are left."""
    command = [sys.executable, "-c", DENOISING, "sample", "--model", tiny[0], "--prompt", "a cup", "--steps", 10_000]
    options = [*SMALL[2:], "--output", tmp_path / "o.png"]
    made = subprocess.Popen([*map(str, command + options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert made.stdout.readline() == "denoising\n", made.stderr.read()
    time.sleep(1)
    began = time.monotonic()
    made.send_signal(number)
    stdout, stderr = made.communicate(timeout=60)
    assert time.monotonic() - began < 15 and (made.returncode, stdout) == (status, "")
    assert stderr.splitlines()[-1] == f"{'interrupted' if status == 130 else 'terminated'}; the picture is lost"
    assert not list(tmp_path.iterdir())


def test_of_several_pictures_it_is_said_how_many_are_lost(tmp_path):
    saving = Saving([tmp_path / "o.png", tmp_path / "o_0.png", tmp_path / "o_1.png"], {}, overwrite=False)
    lost = [saving.lost()]
    for seed in range(2):
        image = Image.new("RGB", (16, 16))
        saving.add(pipeline.Generation([image], ["x"], [seed], None, SampleOptions(), dict(prompt="x"), []))
        lost.append(saving.lost())
    assert lost == ["2 of 2 pictures are lost", "1 of 2 pictures are lost", "there is no grid"]


def test_a_grid_of_many_pictures_is_of_smaller_ones(dynaip, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "GRID_PIXELS", 32 * 32)
    options = ("--prompt", "a cup", "--num-images", 4, *SMALL)
    assert dynaip("sample", "--model", tiny[0], "--output", tmp_path / "o.png", *options)[0] == 0
    assert Image.open(tmp_path / "o_3.png").size == (32, 32) and Image.open(tmp_path / "o.png").size == (32, 32)
