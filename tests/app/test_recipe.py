"""A picture is drawn again from its settings, and options are read from files."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dynaip_jax import images
from dynaip_jax.app import recipe, sample
from dynaip_jax.app.options import given_options, with_options
from dynaip_jax.commandline import parse
from dynaip_jax.errors import UserError
from dynaip_jax.images.files import read_settings
from dynaip_jax.sampling.opening import Opened, open_model
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.sampling.request import make_request
from dynaip_jax.sampling.settings import record

KIND = with_options(sample.Arguments)
OF_A_CALL = {"num_images", "at_once"}  # options of a call, not of a picture
SMALL = ("--steps", 2, "--height", 32, "--width", 32)


def read(argv):
    return parse(KIND, [str(word) for word in argv], "dynaip sample")


def completed(*argv):
    """The arguments that words and the files they name come to, and what they ask to be the same."""
    argv = [str(word) for word in argv]
    words, like = recipe.complete(KIND, read(argv), argv, read)
    return read(words), like


@pytest.fixture(scope="module")
def hat(tmp_path_factory):
    """A second subject, in a file whose name holds what separates it from its words."""
    path = tmp_path_factory.mktemp("hat") / "a=hat.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    left = np.repeat(np.where(np.arange(32) < 16, 255, 0).astype(np.uint8)[None], 32, axis=0)
    for name, mask in (("left.png", left), ("right.png", 255 - left)):
        Image.fromarray(mask).save(folder / name)
    return folder / "left.png", folder / "right.png"


@pytest.fixture
def again(dynaip, tmp_path):
    """Draws a.png by words, then b.png from the settings of `picture` alone: the folder, and how far pixels of both are apart."""

    def twice(*words, picture="a.png"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for command in (
            (*words, "--output", folder / "a.png"),
            ("--like", folder / picture, "--output", folder / "b.png"),
        ):
            status, _, stderr = dynaip("sample", *command)
            assert status == 0, stderr
        assert read_settings(folder / picture) == read_settings(folder / "b.png")
        first, second = (np.asarray(Image.open(folder / name), int) for name in (picture, "b.png"))
        return folder, np.abs(first - second).max()

    return twice


def test_text_alone_is_drawn_again(again, tiny):
    """A prompt of every kind of character, and the other precision."""
    _, difference = again(
        "--model", tiny[0], "--prompt=-- a 'cat'\nüber 猫", "--guidance", 2, "--seed", 9, "--dtype", "bfloat16", "--attention", "per_head",
        *SMALL,
    )  # fmt: skip
    assert difference == 0


def test_subjects_are_drawn_again_and_settings_hold_every_option(again, tiny, photograph, hat):
    folder, difference = again(
        "--model", tiny[0], "--adapter", tiny[1], "--prompt", "a cup and a hat", "--subject", f"{photograph}=cup", "--subject", f"{hat}=hat",
        "--image-scale", 0.5, 0.9, "--text-gain", 0.1, "--granularity", 0, 1, 1, 0.1, 0, 0, "--merge", "concat", "--fit", "crop",
        "--image-start", 0.1, "--image-end", 0.9, "--negative-prompt", "", "--true-cfg", 2.5, "--cache-threshold", 0.3, *SMALL,
    )  # fmt: skip
    assert difference == 0
    settings = read_settings(folder / "a.png")
    assert {f.name for f in dataclasses.fields(SampleOptions)} - settings.keys() == OF_A_CALL
    for name in ("base", "model_fingerprint", "adapter_fingerprint"):
        assert len(settings[name]) == 64
    assert settings["reference_fingerprint"] == [images.digest(images.load_image(path)) for path in (photograph, hat)]


def test_several_are_drawn_again_together_or_alone(again, dynaip, tiny):
    words = ("--model", tiny[0], "--prompt", "a cat", "--prompt", "a dog", "--num-images", 2, "--seed", 5, *SMALL)
    folder, difference = again(*words)
    assert difference == 0
    assert sorted(path.name for path in folder.glob("b_*.png")) == ["b_0.png", "b_1.png", "b_2.png", "b_3.png"]
    status, _, stderr = dynaip("sample", "--like", folder / "a_3.png", "--output", folder / "c.png")
    assert status == 0, stderr
    a, c = (np.asarray(Image.open(folder / name), int) for name in ("a_3.png", "c.png"))
    assert np.abs(a - c).max() <= 1  # batched products may round differently
    assert read_settings(folder / "c.png") == read_settings(folder / "a_3.png")


def test_a_row_of_noise_is_drawn_again(again, dynaip, tiny, photograph, hat, masks, tmp_path):
    noise = np.random.default_rng(0).normal(size=(2, 16, 4, 4)).astype(np.float32)
    np.save(tmp_path / "n.npy", noise)
    folder, difference = again(
        "--model", tiny[0], "--adapter", tiny[1], "--prompt", "a cat", "--noise", tmp_path / "n.npy", "--reference", hat, "--reference",
        photograph, "--mask", masks[0], "--mask", masks[1], *SMALL, picture="a_1.png",
    )  # fmt: skip
    assert difference <= 1 and read_settings(folder / "b.png")["noise_row"] == 1
    np.save(tmp_path / "n.npy", noise + 1)
    status, _, stderr = dynaip("sample", "--like", folder / "b.png", "--output", folder / "d.png")
    assert status == 2 and "--noise 1: not what" in stderr


def written(path, tiny, references, masks=(), **changes):
    """A picture with the settings of a call from Python, which is not made."""
    opened = open_model(*tiny)
    request = make_request(
        opened.model, "a cup", references, masks=masks, changes=dict(steps=2, height=32, width=32) | changes
    )
    asked = (request.prompt, request.options, request.subjects, request.mode, request.noise)
    settings = dict(opened.settings) | record(*asked, routing=np.full((len(request.subjects.references), 3), 1 / 3))
    images.save_png(np.zeros((32, 32, 3), np.uint8), path, settings | dict(seed=request.seeds[0]))
    return path


def test_settings_of_calls_from_python(tiny, photograph, tmp_path):
    path = written(tmp_path / "a.png", tiny, photograph, seed=np.int64(3), image_scale=np.float32(0.5))
    args, like = completed("--like", path)
    given = given_options(args)
    assert [str(p) for p in args.reference] == [str(photograph)] and given["seed"] == 3 and given["image_scale"] == 0.5
    assert like.fingerprints["reference_fingerprint"] == [images.digest(images.load_image(photograph))]
    path = written(tmp_path / "b.png", tiny, Image.open(photograph))
    with pytest.raises(UserError, match="b.png: some `reference` was in memory, not in a file"):
        completed("--like", path)


# --- every option, without drawing


def settings_file(path, tiny, **changes):
    """A picture with settings such as `dynaip sample` writes."""
    settings = dict(
        prompt="a cat", steps=2, guidance=3.5, height=32, width=32, seed=4, model=str(tiny[0]), adapter=str(tiny[1]), reference=["a.png", "b.png"],
        mask=[], noise=None, words=["cat", "dog"], regions="auto", dtype="float32", weights="full", attention="auto", any_base=False,
    )  # fmt: skip
    images.save_png(np.zeros((8, 8, 3), np.uint8), path, settings | changes, overwrite=True)
    return path


OPTIONS = dict(
    negative_prompt="", true_cfg=3.0, height=64, width=48, steps=7, guidance=1.5, seed=11, num_images=3, cache_threshold=0.1, regions="none",
    fit="crop", image_scale=(0.1, 0.2), text_gain=0.3, granularity=((1.0, 0.0, 0.1), (0.0, 1e-05, 1.0)), merge="concat", image_start=0.25,
    image_end=0.75, block_scale=(0.5, 0.0),
)  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(SampleOptions) if f.name != "at_once"])
def test_every_option_is_taken_over_and_can_be_changed(tiny, tmp_path, name):
    value = OPTIONS[name]
    recorded = dict(seed=[4, 5, 6]) if name == "num_images" else {name: value}
    path = settings_file(tmp_path / "a.png", tiny, **recorded)
    args, _ = completed("--like", path)
    assert given_options(args)[name] == value
    other = {
        "regions": "auto",
        "fit": "pad",
        "merge": "sum",
        "granularity": (1.0, 1.0, 1.0),
        "block_scale": (1.0,),
        "negative_prompt": "dull",
    }.get(name, 1)
    words = [f"--{name.replace('_', '-')}", *(other if isinstance(other, tuple) else (other,))]
    args, _ = completed("--like", path, *words)
    assert given_options(args)[name] == other


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    (
        ("model", "elsewhere", "elsewhere"),
        ("adapter", "elsewhere", "elsewhere"),
        ("dtype", "bfloat16", "bfloat16"),
        ("weights", "fp8", "fp8"),
        ("attention", "xla", "xla"),
        ("any_base", True, True),
    ),
)
def test_how_it_was_loaded_is_taken_over(tiny, tmp_path, name, value, expected):
    args, _ = completed("--like", settings_file(tmp_path / "a.png", tiny, **{name: value}))
    assert getattr(args, name) == expected


def test_old_settings_do(tiny, tmp_path):
    old = dict(
        prompt="a cat",
        steps=2,
        guidance=None,
        height=32,
        width=32,
        seed=4,
        model=str(tiny[0]),
        adapter=None,
        base="0",
        reference=[],
    )
    images.save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "a.png", old)
    args, like = completed("--like", tmp_path / "a.png")
    assert (args.prompt, args.steps, args.seed, args.guidance, args.adapter) == (("a cat",), 2, 4, None, None)
    assert like.fingerprints == dict(base="0")


# --- what is no longer the same


def test_what_was_replaced_is_named_unless_it_is_asked_for(dynaip, tiny, photograph, masks, tmp_path, monkeypatch):
    mine, model, adapter, mask = tmp_path / "mine.png", tmp_path / "model", tmp_path / "adapter", tmp_path / "mask.png"
    (
        shutil.copy(photograph, mine),
        shutil.copytree(tiny[0], model),
        shutil.copytree(tiny[1], adapter),
        shutil.copy(masks[0], mask),
    )
    path = written(tmp_path / "a.png", (model, adapter), [mine], [mask])

    def stop(opened):
        raise UserError("all is as it was")

    monkeypatch.setattr(Opened, "read", stop)

    def like(*changes):
        return dynaip("sample", "--like", path, "--output", tmp_path / "b.png", *changes)[2]

    def goes_on(*changes):
        return like(*changes).endswith("error: all is as it was\n")

    assert goes_on()
    other = Image.open(photograph).transpose(Image.Transpose.ROTATE_180)
    for file, picture, flag in ((mine, other, "--reference"), (mask, Image.open(masks[1]), "--mask")):
        before = file.read_bytes()
        picture.save(file)
        assert f"error: {flag} 1: not what {path} was made with" in like() and f"pass {flag}" in like()
        assert goes_on(flag, file)
        file.write_bytes(before)
    for folder, file, flag in ((model, "bundle.json", "--model"), (adapter, "adapter.json", "--adapter")):
        manifest = (folder / file).read_text()
        (folder / file).write_text(json.dumps(json.loads(manifest) | dict(note="another")))
        assert f"error: {flag}: not what" in like()
        assert goes_on(flag, folder)
        (folder / file).write_text(manifest)
    shutil.move(mine, tmp_path / "moved.png")
    assert "mine.png: no such file" in like()
    assert goes_on("--reference", tmp_path / "moved.png")


def test_the_model_in_the_package_is_found_wherever_it_lay(tiny, tmp_path):
    from dynaip_jax.shapeland import default
    from dynaip_jax.storage.adapter import ADAPTER_WEIGHTS
    from dynaip_jax.storage.identity import identity

    bundle, adapter = default.paths()
    manifest, other = (json.loads(path.read_text()) for path in (bundle / "bundle.json", adapter / "adapter.json"))
    known = dict(model_fingerprint=identity(manifest), adapter_fingerprint=identity(other, adapter / ADAPTER_WEIGHTS))
    path = settings_file(tmp_path / "a.png", tiny, model="/gone", adapter="/gone too", **known)
    args, _ = completed("--like", path)
    assert args.model is None and args.adapter is None
    args, _ = completed(
        "--like", settings_file(path, tiny, model="/gone", adapter="/mine", **known | dict(adapter_fingerprint="1"))
    )
    assert args.model is None and args.adapter == "/mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        (dict(prompt=None), "its settings name no prompt"),
        (dict(prompt=["a", 3]), "`prompt` in its settings is no text"),
        (dict(prompt=[]), "its settings name no prompt"),
        (dict(seed=[4, 9]), "its seeds do not follow each other"),
        (dict(seed=None), "made from noise in memory"),
        (dict(seed=["4"]), "made from noise in memory"),
        (dict(reference=[None, "a.png"]), "some `reference` was in memory"),
        (dict(mask=5), "`mask` in its settings is no text"),
        (dict(steps="many"), "Error parsing --steps"),
        (dict(steps={"a": 1}), "`steps`: found dict; expected a number"),
        (dict(dtype="int8"), "--dtype: invalid choice: 'int8'"),
        (dict(any_base="yes"), "`any_base` 'yes': expected true or false"),
    ),
)
def test_settings_that_are_not_ours_are_one_line(tiny, tmp_path, settings, message):
    path = settings_file(tmp_path / "a.png", tiny, **settings)
    with pytest.raises(UserError) as caught:
        completed("--like", path)
    assert message in str(caught.value) and str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 300


# --- run files


def test_a_run_file_stands_for_words_that_win_over_it(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "model: m\nsteps: 9\nreference: [a.png, b.png]\nseed: 3\nguidance: 2\nany_base: true\n"
    )
    (tmp_path / "run.yaml").write_text(
        "prompt: [a cat, '-- dog']\nnum-images: 4\nsteps: 20\ngranularity: [0, 1, 1]\nimage_scale: 0.5\nnegative_prompt: ''\n"
        "guidance: null\npresets:\n  draft: {steps: 4, cache_threshold: 1e-1}\n  other: {steps: 5}\n"
    )
    files = ("--options", tmp_path / "base.yaml", "--options", tmp_path / "run.yaml")
    args, _ = completed(*files)
    assert (args.model, args.steps, args.seed, args.num_images, args.any_base) == ("m", 20, 3, 4, True)
    assert args.prompt == ("a cat", "-- dog") and [str(path) for path in args.reference] == ["a.png", "b.png"]
    assert (
        args.granularity == (0, 1, 1)
        and args.image_scale == (0.5,)
        and args.negative_prompt == ""
        and args.guidance is None
    )
    args, _ = completed(
        *files, "--preset", "draft", "--subject", "c.png=cat", "--prompt", "x", "--random-seed", "--num-images=1"
    )
    assert (args.steps, args.cache_threshold, args.prompt, args.num_images) == (4, 0.1, ("x",), 1)
    assert args.reference == () and args.subject == ("c.png=cat",) and args.seed is None and args.random_seed


def test_run_files_win_over_a_picture(tiny, tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 8\nreference: c.png\n")
    args, like = completed(
        "--like",
        settings_file(tmp_path / "a.png", tiny, reference_fingerprint=["1"], base="2"),
        "--options",
        tmp_path / "run.yaml",
    )
    assert (
        args.seed == 8
        and args.steps == 2
        and [str(path) for path in args.reference] == ["c.png"]
        and args.subject == ()
    )
    assert like.fingerprints == dict(base="2")


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("steps: many", "Error parsing --steps: invalid literal"),
        ("stpes: 3", "stpes: no such option"),
        ("like: a.png", "like: no such option"),
        ("- steps", "found list; expected lines such as `steps: 20`"),
        ("steps", "found str; expected lines"),
        ("3: 4", "found dict; expected lines"),
        ("steps: [1, 2", "not YAML"),
        ("steps: !!python/object/apply:os.getcwd []", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("a: \xff\xfe".encode("latin-1"), "not YAML"),
        ("prompt: no", "`prompt`: found false; expected a number, or text (in quotes)"),
        ("prompt: 2026-11-26", "`prompt`: found date"),
        ("steps: {a: 1}", "`steps`: found dict"),
        ("prompt: &a [&b [&c [x, x], *c], *b]", "`prompt`: found list"),
        ("any_base: 1", "`any_base` 1: expected true or false"),
        ("presets: 3", "presets: found int; expected lines"),
        ("#" * (1 << 21), "more than 1048576 bytes"),
        ("", "`preset` draft: in no run file"),
        ("presets: {draft: {stpes: 3}}", "stpes: no such option"),
    ),
)  # fmt: skip
def test_run_files_that_do_not_fit(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        completed("--options", path, *(("--preset", "draft") if "draft" in message + str(text) else ()))
    said = str(caught.value)
    assert message in said and (str(path) in said or "`preset`" in said) and "\n" not in said and len(said) < 300


def test_a_missing_run_file_and_a_preset_without_one(tmp_path):
    with pytest.raises(UserError, match="`options` .*none.yaml: cannot be read .No such file"):
        completed("--options", tmp_path / "none.yaml")
    with pytest.raises(UserError, match="`preset`: given without a run file"):
        completed("--preset", "draft")


# --- seeds and names


def test_a_seed_by_chance_is_said_and_kept(dynaip, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sample.secrets, "randbelow", lambda limit: limit - 1)
    status, stdout, stderr = dynaip(
        "sample", "--model", tiny[0], "--prompt", "A cat!", "--random-seed", "--num-images", 2, "--output", tmp_path / "{prompt}_{seed}.png",
        *SMALL,
    )  # fmt: skip
    last = 2**32 - 1
    assert status == 0 and stderr == f"seed {last - 1}\n"
    names = [f"A_cat_{seed}.png" for seed in (last - 1, last, f"{last - 1}-{last}")]
    assert stdout.split() == [str(tmp_path / name) for name in names]
    assert read_settings(tmp_path / names[1])["seed"] == last


@pytest.mark.parametrize(
    ("words", "message"),
    (
        ("--output o.png", "--prompt: none given; expected at least one; pass --prompt TEXT"),
        ("--prompt x", "--output: none given; expected the picture's name"),
        ("--prompt x --output o.png --seed 3 --random-seed", "--random-seed: it fixes what --seed would choose"),
        ("--prompt x --output o.png --noise n.npy --random-seed", "--noise: it fixes what --random-seed would choose"),
        ("--prompt x --output o.png --noise-row 1", "--noise-row: no noise to take it from"),
    ),
)
def test_what_is_missing_or_said_twice(dynaip, words, message):
    status, _, stderr = dynaip("sample", *words.split())
    assert status == 2 and message in stderr and len(stderr.splitlines()) == 1
