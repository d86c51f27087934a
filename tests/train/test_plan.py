"""`python -m train.plan`: real programs compiled for a TPU on this CPU, and what is read off them."""

import json
import re

import jax
import pytest

from dynaip_jax.commandline import run_cli
from dynaip_jax.planner import chips
from tests.train.runs import RECIPE
from train.plan import main

TOPOLOGY = "v5e:2x2"


@pytest.fixture
def plan(capsys):
    """Runs the command in this process -> (exit status, stdout, stderr). Programs for other machines cannot be kept."""

    def run(*words):
        status = run_cli(main, [str(w) for w in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    jax.config.update("jax_enable_compilation_cache", False)
    yield run
    jax.config.update("jax_enable_compilation_cache", True)


def test_a_training_step_on_a_topology(plan):
    status, stdout, stderr = plan("--config", RECIPE, "--topology", TOPOLOGY, "--mesh", "fsdp=2,tensor=2", "--json")
    assert status == 0, stderr
    report = json.loads(stdout)
    assert report["fits"] and report["device"] == "TPU v5 lite" and report["devices"] == 4
    assert report["mesh"] == dict(data=1, fsdp=2, tensor=2)
    features, step = report["programs"]
    assert step["name"] == "step" and step["collectives"]["all-gather"]["count"] > 0
    assert 0 < report["hbm"]["used"] < report["hbm"]["available"] == 16 * 2**30
    transformer = report["components"]["transformer"]
    assert transformer["bytes_per_chip"] < 4 * transformer["parameters"] / 3  # float32, in up to four parts
    assert report["step_seconds"] == pytest.approx(features["roofline_seconds"] + step["roofline_seconds"])


def test_training_scales_over_chips_and_slices(plan):
    """Four times the chips and the batch: the same work and no more memory a chip. A slice does what it does alone, on its part of the
    batch."""

    def report(topology, mesh, batch):
        words = ("--topology", topology, "--mesh", mesh, "--batch", batch, "--json")
        status, stdout, stderr = plan("--config", RECIPE, *words)
        assert status == 0, stderr
        return json.loads(stdout)

    one = report("v5e:2x2", "data=1,fsdp=4", 4)["programs"]
    for few, many in zip(one, report("v5e:4x4", "data=4,fsdp=4", 16)["programs"], strict=True):
        for flops_of in ("flops_per_chip", "compiled_flops"):
            assert 0 < many[flops_of] == pytest.approx(few[flops_of], rel=0.05)
        assert many["kernels"] == few["kernels"]
        assert many["needed_bytes"] < 1.05 * few["needed_bytes"]
    both = report("2xv5e:2x2", "data=2,fsdp=4", 8)
    assert both["devices"] == 8 and both["mesh"] == dict(data=2, fsdp=4, tensor=1)
    for two_slices, one_slice in zip(both["programs"], one, strict=True):
        assert two_slices["compiled_flops"] == pytest.approx(one_slice["compiled_flops"], rel=0.05)
    assert plan("--config", RECIPE, "--topology", "2xv5e:2x2", "--mesh", "data=1,fsdp=8")[0] == 2


def test_eight_bit_weights_and_a_text_encoder_in_the_hosts_memory(plan):
    command = ("--config", RECIPE, "--job", "sample", "--topology", TOPOLOGY, "--json")
    options = ("--weights", "int8", "--offload-text")
    full, small = (json.loads(plan(*command, *more)[1]) for more in ((), options))
    before, after = ({k: v["bytes_per_chip"] for k, v in r["components"].items()} for r in (full, small))
    assert after["t5"] == 0 < before["t5"]
    assert 0.4 * before["transformer"] < after["transformer"] < 0.7 * before["transformer"]
    needed = [{p["name"]: p["needed_bytes"] for p in r["programs"]} for r in (full, small)]
    saved = needed[0]["encode text"] - needed[1]["encode text"]
    assert saved == before["transformer"] - after["transformer"]  # T5 is there while it encodes
    assert needed[0]["decode"] - needed[1]["decode"] == saved + before["t5"]
    status, _, stderr = plan("--config", RECIPE, "--topology", TOPOLOGY, *options)
    assert status == 2 and stderr.startswith("error: --job train: --weights and --offload-text are about sampling")


def test_sampling_on_these_devices_and_a_chip_that_is_too_small(plan, monkeypatch):
    command = ("--config", RECIPE, "--job", "sample", "--sample.size", 64, "--sample.steps", 2)
    status, stdout, stderr = plan(*command)
    assert status == 0 and stdout.splitlines()[-1] == "fits", stderr
    assert "denoise: " in stdout and "of an unknown amount GiB a chip" in stdout
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.Chip(1e12, 4e6, 1e11, 1e10))
    status, stdout, _ = plan(*command)
    assert status == 1
    last = stdout.splitlines()[-1]
    assert re.fullmatch(
        r"does not fit: \w+: needs [\d.]+ GiB a chip, 0.0 are there: parameters [\d.]+, scratch [\d.]+.*", last
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (("--topology", "v5e:9x9"), "--topology v5e:9x9: refused by libtpu"),
        (("--mesh", "fsdp"), "--mesh fsdp: 'fsdp'; expected such as data=2,fsdp=4,tensor=1"),
        (("--mesh", "fsdp=3"), "mesh data x fsdp x tensor = 1 x 3 x 1: does not fit 1 devices"),
        (("--bath", "4"), "--bath"),
    ],
)
def test_errors(plan, words, message):
    status, _, stderr = plan("--config", RECIPE, *words)
    assert status == 2 and message in stderr and len(stderr.splitlines()) == 1
