"""The embedded model of Shapeland: what ships, that it does what the method is for, and the loop that trained its parts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from dynaip_jax.errors import UserError
from dynaip_jax.families.registry import open_bundle
from dynaip_jax.images.files import read_settings
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland import default
from dynaip_jax.shapeland import measure as shapeland
from dynaip_jax.shapeland import world as synthetic
from dynaip_jax.storage.manifest import flatten
from dynaip_jax.storage.tensors import read_tree
from train.shapeland.stages import DONE, FAMILY, KEPT, STAGES, WEIGHTS, fit, main

CASES = 64


@pytest.fixture(scope="module")
def judge():
    return read_tree(default.JUDGE)


@pytest.fixture(scope="module")
def known(judge):
    return shapeland.calibrate(judge, 1)


def test_assets_are_small_and_say_how_they_were_made():
    size = sum(file.stat().st_size for file in default.ASSETS.rglob("*") if file.is_file())
    assert size < 25 * 2**20
    made = json.loads((default.ASSETS / "made.json").read_text())
    stages = KEPT if "--go-on" in made["command"] else STAGES
    assert [stage["stage"] for stage in made["stages"]] == list(stages)[:-1]  # all but the one that wrote this
    assert made["command"].startswith("python -m train.shapeland") and "jax" in made["versions"]


def test_the_judge_sees_true_renders(judge, known):
    assert shapeland.doubts({1: known}) == []
    assert known.same > known.other + 0.5


def test_another_identity_has_cp_0_and_a_true_render_1(judge, known):
    cases = shapeland.make_cases(1, seed=5, num=96)
    cp, pf = shapeland.scores(judge, cases.renders, cases, known)
    assert cp.mean() == pytest.approx(1, abs=0.1) and pf.mean() > 0.98
    others = []
    for n, scene in enumerate(cases.scenes):
        rng = synthetic.generator(6, "test", n)
        placed = scene.subjects[0]._replace(identity=synthetic.sample_identity(rng))
        others.append(synthetic.render(scene._replace(subjects=(placed,))).image)
    cp, pf = shapeland.scores(judge, np.stack(others), cases, known)
    assert abs(cp.mean()) < 0.15 and pf.mean() > 0.98


def test_the_reference_gives_the_identity_and_the_prompt_is_kept(judge, known):
    pipe = DynaIPPipeline.load(*default.paths())
    rows = shapeland.evaluate(pipe, judge, ["default", "text-only"], [1], num=CASES, calibrations={1: known})
    shown, told = rows
    assert shown["cp_ci"][0] > told["cp_ci"][1] and abs(told["cp"]) < 0.3
    assert min(shown["pf"], told["pf"]) > 0.9


def test_a_drawing_of_ones_own(dynaip, tmp_path):
    scene = synthetic.sample_scene(synthetic.generator(0, "test", 4), large=True)
    Image.fromarray(synthetic.render(scene).image).resize((300, 300)).save(tmp_path / "mine.png")
    prompt = f"a {scene.subjects[0].kind} on the left on sand at noon"
    command = ("demo", "--output", tmp_path / "o.png", "--reference", tmp_path / "mine.png")
    status, stdout, stderr = dynaip(*command, "--prompt", prompt)
    assert status == 0 and stdout.split() == [str(tmp_path / "o.png")], stderr
    rows = read_settings(tmp_path / "o.png")["rows"]
    assert rows[0] == [prompt, "reference", "text only", "DDS off", "DDS on (default)"] and len(rows) == 2
    status, _, stderr = dynaip(*command, "--overwrite")
    assert status == 2 and "--reference: given without --prompt" in stderr


def test_a_loop_that_was_cut_off_goes_on(tmp_path):
    def loss(params, batch, key):
        value = jnp.square(params["x"] - batch + 0.1 * jax.random.normal(key, (3,))).mean()
        return value, dict(twice=2 * value)

    def train(folder, cut=None):
        def batch_of(step):
            if step == cut:
                raise InterruptedError
            return jnp.full(3, step)

        return fit(tmp_path / folder, dict(x=jnp.zeros(3)), loss, batch_of, 500, 0.01, seed=0)

    straight = train("straight")
    with pytest.raises(InterruptedError):
        train("cut", cut=300)
    np.testing.assert_array_equal(train("cut")["x"], straight["x"])


def test_going_on_starts_from_the_package_with_another_t5(tmp_path):
    fresh = FAMILY.init_params("t5", jax.random.key(7))
    (tmp_path / "text").mkdir()
    save_file({k: np.asarray(v) for k, v in flatten(fresh).items()}, tmp_path / "text" / WEIGHTS)
    main(["--workdir", str(tmp_path), "--go-on", "--stages", "encoders"])
    assert json.loads((tmp_path / "encoders" / DONE).read_text())["seconds"] >= 0
    own = open_bundle(default.paths()[0])
    pipe = DynaIPPipeline.load(tmp_path / "encoders" / "bundle")
    assert pipe.bundle.fingerprint == own.fingerprint
    for name, x in flatten(pipe.params["t5"]).items():
        np.testing.assert_allclose(x, flatten(fresh)[name], rtol=2**-8, err_msg=name)  # bfloat16
    with pytest.raises(UserError, match="--stages vae: is kept with --go-on"):
        main(["--workdir", str(tmp_path), "--go-on", "--stages", "vae"])
