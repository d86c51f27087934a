"""`python -m train.export`: what it writes, and what it refuses."""

import json
import shutil

import jax
import numpy as np

from dynaip_jax.sampling.pipeline import DynaIPPipeline
from tests.train.runs import contents, fixed, refused
from train import export as command
from train.export import export
from train.loop import train
from train.run import Run


def test_the_exported_adapter_is_the_average_and_draws(adapter_run, tiny, tmp_path, dynaip, photograph):
    workdir, state = adapter_run
    for weights in ("ema", "params"):
        export(workdir, tmp_path / weights, None, "last", weights)
        pipe = DynaIPPipeline.load(tiny[0], tmp_path / weights)
        jax.tree.map(np.testing.assert_array_equal, pipe.adapter[1], getattr(state, weights)["adapter"])
    assert json.loads((tmp_path / "ema/adapter.json").read_text())["training_step"] == 120
    status, _, stderr = dynaip(
        "sample", "--model", tiny[0], "--adapter", tmp_path / "ema", "--prompt", "x", "--reference", photograph,
        "--steps", 1, "--height", 32, "--width", 32, "--output", tmp_path / "o.png",
    )  # fmt: skip
    assert status == 0, stderr


def test_a_trained_base_is_exported_as_a_bundle_with_its_adapter(config, tmp_path):
    state = train(fixed(config, trainable="all", steps=2, save_every=2), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "adapter", tmp_path / "bundle", "best", "params")
    pipe = DynaIPPipeline.load(tmp_path / "bundle", tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, pipe.params["transformer"], state.params["transformer"])
    assert pipe.bundle.fingerprint != Run(config).bundle.fingerprint


def test_weights_can_be_exported_in_bfloat16(adapter_run, tiny, tmp_path):
    export(adapter_run[0], tmp_path / "half", None, dtype="bfloat16")
    size = (tmp_path / "half" / "adapter.safetensors").stat().st_size
    export(adapter_run[0], tmp_path / "whole", None)
    assert size < 0.6 * (tmp_path / "whole" / "adapter.safetensors").stat().st_size
    half, whole = (DynaIPPipeline.load(tiny[0], tmp_path / name).adapter[1] for name in ("half", "whole"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-8), half, whole)


def test_bad_exports(trainer, two_steps, tmp_path):
    run = two_steps

    def rejected(folder, *options, found):
        refused(trainer, ["--workdir", folder, *options], found, command=command.main)

    before, out = contents(tmp_path), ("--out", tmp_path / "adapter")
    rejected(tmp_path, *out, found=f"--workdir {tmp_path}: no readable run.json")
    rejected(run, *out, "--step", 7, found=f"--step 7: no such checkpoint in {run}; it has 2")
    rejected(run, *out, "--step", "first", found="--step first: no such checkpoint")
    rejected(run, found="--out: not given; this run trained trainable='adapter'; pass --out ADAPTER")
    rejected(run, *out, "--bundle", tmp_path / "bundle", found="--bundle: given; this run trained trainable='adapter'")
    assert contents(tmp_path) == before
    assert trainer(["--workdir", run, *out], command=command.main)[0] == 0
    rejected(run, *out, found=f"{tmp_path / 'adapter'}")
    for trainable, found in (
        ("all", "--bundle: not given; this run trained trainable='all'; pass --bundle BUNDLE for the base it trained"),
        ("base", "--out: given; this run trained trainable='base'; there is no adapter in it; leave it out"),
    ):
        manifest = json.loads((run / "run.json").read_text())
        manifest["config"]["trainable"] = trainable
        (run / "run.json").write_text(json.dumps(manifest))
        rejected(run, *out, found=found)
    shutil.rmtree(run / "checkpoints")
    manifest["config"]["trainable"] = "adapter"
    (run / "run.json").write_text(json.dumps(manifest))
    rejected(run, "--out", tmp_path / "new", found="--step last: no such checkpoint")
