"""What a user can get wrong about a run: one line, exit status 2, and nothing lost or half written."""

import json
import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from dynaip_jax.data.config import buckets
from dynaip_jax.data.order import BatchOrder
from dynaip_jax.data.records import open_dataset
from dynaip_jax.errors import UserError
from dynaip_jax.shapeland import default
from tests.train.runs import RECIPE, Child, contents, metrics, refused, state, steps, words
from train.loop import check_finite
from train.workdir import read_config

RECIPES = {
    "empty": ("", "has no CONFIG = TrainConfig(...); see configs/debug.py"),
    "another": ("CONFIG = dict(steps=1)", "has no CONFIG = TrainConfig(...)"),
    "raises": ("1 / 0", "cannot be run (ZeroDivisionError: division by zero); correct it"),
    "syntax": ("CONFIG = (", "cannot be run (SyntaxError"),
    "value": ("from train.config import TrainConfig\nCONFIG = TrainConfig(batch=0)", "--batch 0: expected at least 1"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_bad_recipes(trainer, tmp_path, name):
    text, found = RECIPES[name]
    recipe = tmp_path / "recipe.py"
    recipe.write_text(text)
    refused(trainer, ["--config", recipe, "--workdir", tmp_path / "run"], found)
    assert not (tmp_path / "run").exists()


FIELDS = [
    (("--bath", 4), "--bath"),
    (("--batch", "four"), "--batch", "four"),
    (("--trainable", "nothing"), "--trainable", "nothing"),
    (("--batch", 0), "--batch 0: expected at least 1"),
    (("--random-granularity", 1.5), "--random-granularity 1.5: expected a share from 0 to 1"),
    (("--batch", 6, "--accumulate", 4), "--accumulate 4: does not divide --batch 6"),
    (("--fresh-base",), "--fresh-base: a frozen base must not be random; pass --trainable base or all"),
    (("--data.drop-image", 2), "--data.drop-image 2.0: expected a number from 0 to 1"),
    (("--data.resolution", 32), "--data.resolution 32: expected at least 64 pixels"),
    (("--data.path", ""), "--data.path: not given", "pass --data.path DIR"),
    (("--data.path", "/missing"), "dataset /missing: no dataset_info.json", "python -m train.prepare"),
    (("--batch", 9), "dataset: 8 rows for a global batch of 9"),
    (("--data.remove-background",), "--data.remove-background: 8 of 8 rows", "have no mask (row 1 is the first)"),
    (("--data.clip-size", 48), "--data.clip-size 48: the CLIP of", "takes 64 pixels; set it to that"),
    (("--adapter.levels", 10, 17, 24), "--adapter.levels (10, 17, 24): the CLIP of", "has 6 layers"),
    (("--bundle", "/missing"), "/missing"),
    (("--sample.every", 1, "--sample.size", 36), "--sample.size 36: expected a multiple of 8"),
    (("--validation.every", 1), "--validation.every 1: needs held-out rows; pass --validation.path"),
    (("--validation.every", 1, "--validation.path", "/missing"), "dataset /missing: no dataset_info.json"),
    (("--validation.batches", 0), "--validation.batches 0: expected at least 1"),
    (("--profile.start", 0), "--profile.start 0, --profile.steps 0: expected a first step of at least 1"),
    (("--optim.rate", -1), "--optim.rate -1.0: expected a number above 0"),
    (("--optim.rate", "nan"), "--optim.rate nan: expected a number above 0"),
    (("--optim.rate", "inf"), "--optim.rate inf: expected a number above 0"),
    (("--optim.muon-rate", 0), "--optim.muon-rate 0.0: expected a number above 0"),
    (("--optim.warmup", -5), "--optim.warmup -5: expected a number of at least 0"),
    (("--optim.decay-steps", 10), "--optim.decay-steps 10: expected more than --optim.warmup, 10"),
    (("--optim.final", 2), "--optim.final 2.0: expected a number from 0 to 1"),
    (("--optim.b1", 1), "--optim.b1 1.0: expected a number from 0"),
    (("--optim.b2", 1.5), "--optim.b2 1.5: expected a number from 0"),
    (("--optim.ema", 1.5), "--optim.ema 1.5: expected a number from 0"),
    (("--optim.clip", 0), "--optim.clip 0.0: expected a norm above 0; for no clipping a large one"),
    (("--optim.clip", "nan"), "--optim.clip nan: expected a norm above 0"),
    (("--optim.weight-decay", -10), "--optim.weight-decay -10.0: expected a number of at least 0"),
    (("--time-mean", "nan"), "--time-mean nan: expected a number from"),
    (("--time-std", 0), "--time-std 0.0: expected a number above 0"),
    (("--guidance", "nan"), "--guidance nan: expected a number from 0"),
    (("--seed", -1), "--seed -1: expected a number from 0 to 2147483647"),
    (("--seed", 5000000000), "--seed 5000000000: expected a number from 0"),
    (("--data.resolution", 100000), "--data.resolution 100000: expected a number from 64"),
    (("--adapter.levels", -1, 2, 4), "--adapter.levels (-1, 2, 4): expected three layers of CLIP from 1"),
    (("--adapter.levels", 4, 3, 2), "--adapter.levels (4, 3, 2): expected three layers of CLIP from 1"),
    (("--adapter.expert-width", 0), "--adapter.expert-width 0: expected a number from 1"),
    (("--adapter.resampler-tokens", 10**9), "--adapter.resampler-tokens 1000000000: expected a number from 0"),
    (("--adapter.weights", 0, 0, 0), "--adapter.weights (0.0, 0.0, 0.0): all 0"),
    (("--adapter.weights", -1, 1, 1), "--adapter.weights -1.0: expected a number of at least 0"),
    (("--sample.every", -1), "--sample.every -1: expected a number of at least 0"),
    (("--sample.steps", 0), "--sample.steps 0: expected a number from 1 to 1000"),
    (("--sample.rows", 0), "--sample.rows 0: expected a number from 1"),
    (("--sample.size", 0), "--sample.size 0: expected a number from 16"),
    (("--sample.guidance", "nan"), "--sample.guidance nan: expected a number of at least 0"),
    (("--validation.every", -1), "--validation.every -1: expected a number of at least 0"),
    (("--resume", "--overwrite"), "--resume and --overwrite: they exclude each other; pass one"),
]


@pytest.mark.parametrize("options, found", [(f[0], f[1:]) for f in FIELDS], ids=lambda x: str(x[0]).strip("-")[:30])
def test_bad_fields(trainer, tmp_path, options, found):
    """Before the folder of the run is touched."""
    refused(trainer, words(tmp_path / "run", *options), *found)
    assert not (tmp_path / "run").exists()


def test_bad_command_lines(trainer, tmp_path):
    missing = tmp_path / "missing.py"
    refused(trainer, ["--workdir", tmp_path], "--config")
    refused(trainer, ["--config", missing, "--workdir", tmp_path / "run"], f"--config {missing}: no such file")
    refused(trainer, ["--config", RECIPE], "--workdir: not given; expected a folder for the run")


def test_bad_folders(trainer, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(trainer, words(tmp_path / "file"), f"--workdir {tmp_path / 'file'}: is a file; expected a folder")
    refused(trainer, words(tmp_path / "file" / "run"), f"--workdir {tmp_path / 'file' / 'run'}: cannot be written")
    for option in ((), ("--resume",), ("--overwrite",)):
        refused(trainer, words(tmp_path, *option), "holds files that are not a run's; choose an empty or new folder")
    assert contents(tmp_path) == {(tmp_path / "file").relative_to(tmp_path): b"mine"}


def test_a_run_is_neither_deleted_nor_gone_on_with_unasked(trainer, two_steps, tmp_path):
    run = two_steps
    before = contents(run)
    refused(trainer, words(run), f"--workdir {run}: holds a run; pass --resume to go on with it or --overwrite")
    refused(
        trainer, words(run, "--resume", "--optim.rate", 0.5, "--data.flip-target", 1),
        f"--resume {run}: config differs: data.flip_target: 0.0 -> 1.0; optim.rate: 0.001 -> 0.5; use the run's own",
    )  # fmt: skip
    other = tmp_path / "other"
    shutil.copytree(default.paths()[0], other)
    manifest = json.loads((other / "bundle.json").read_text())
    (other / "bundle.json").write_text(json.dumps(manifest | dict(fingerprint="5" * 64)))
    refused(
        trainer, words(run, "--resume", "--bundle", other),
        f"--resume {run}: trained on another base (fingerprint {manifest['fingerprint'][:12]}, this one has 555555555555)",
    )  # fmt: skip
    refused(
        trainer, words(run, "--overwrite", "--data.path", "/missing"), "dataset /missing"
    )  # found before it deletes
    assert contents(run) == before
    (run / "samples").mkdir()
    (run / "samples" / "step_000002.png").write_bytes(b"")
    assert trainer(words(run, "--overwrite", "--steps", 1))[0] == 0
    assert steps(run) == [1] and [line["step"] for line in metrics(run)] == [1] and not (run / "samples").exists()


def test_a_damaged_run_is_told_of(trainer, two_steps):
    run = two_steps
    assert trainer(words(run, "--resume", "--steps", 4))[0] == 0
    for path in (run / "checkpoints" / "4" / "state").glob("**/d/*"):
        path.write_bytes(path.read_bytes()[:100])
    refused(trainer, words(run, "--resume"), f"{run}/checkpoints/4: state/", "is damaged", "with --resume-from 2")
    shutil.rmtree(run / "checkpoints" / "4")
    assert trainer(words(run, "--resume", "--steps", 3))[0] == 0
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    (run / "run.json").write_text("{")
    refused(trainer, words(run, "--resume"), f"{run}/run.json: not readable", "start again with --overwrite")


def test_a_loss_that_is_not_finite(trainer, tmp_path):
    """Names the step and the rows; the checkpoint of before is whole."""
    run = tmp_path / "run"
    wild = ("--optim.rate", 1e30, "--optim.clip", 1e30, "--optim.warmup", 1, "--save-every", 1)
    status, lines = trainer(words(run, *wild))
    assert status == 2 and sum(line.startswith("error: ") for line in lines) == 1
    done = steps(run)[-1]
    assert [line["step"] for line in metrics(run)] == list(range(1, done + 1))
    config = read_config(run)
    dataset = open_dataset(config.data.path)
    shapes = buckets(config.data.resolution, config.data.aspects)
    rows = BatchOrder(dataset.sizes, shapes, 2, config.data.seed).step(done).rows
    assert lines[-1].startswith(f"error: step {done + 1}: the ")
    assert f"is nan; batch rows {dataset.numbers[rows].tolist()}; expected a finite number" in lines[-1]
    assert state(run, done)["['step']"] == done


def test_a_gradient_that_is_not_finite():
    run = SimpleNamespace(dataset=SimpleNamespace(numbers=np.arange(1, 9)))
    values = dict(loss=np.float32(1), grad_norm=np.float32(np.inf))
    with pytest.raises(UserError, match=r"step 7: the gradient norm is inf; batch rows \[3, 1\]"):
        check_finite(run, 7, values, np.array([2, 0]))
    check_finite(run, 7, values | dict(grad_norm=np.float32(2)), np.array([2, 0]))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs a limit set on another process")
def test_a_full_disk(home, trainer, tmp_path):
    """Once there is a checkpoint, no file may grow beyond 50 kB. With room again the run goes on, and ends as if nothing was."""
    run = tmp_path / "run"
    child = Child.train(home, tmp_path / "log", *words(run, "--steps", 1000))
    child.wait_for((run / "checkpoints" / "2").is_dir)
    resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    assert child.end() == 2, child.log.read_text()
    lines = child.lines()
    assert lines[-1].startswith(f"error: --workdir {run}: ") and lines[-1].endswith(", then --resume")
    assert all(line.startswith("step ") for line in lines[:-1])
    last = steps(run)[-1]
    assert trainer(words(run, "--steps", last + 2, "--resume"))[0] == 0
    assert [line["step"] for line in metrics(run)] == list(range(1, last + 3))
    straight = tmp_path / "straight"
    assert trainer(words(straight, "--steps", last + 2))[0] == 0
    assert all(np.array_equal(x, state(run, last + 2)[name]) for name, x in state(straight, last + 2).items())
