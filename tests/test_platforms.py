"""No alarm where libtpu is installed without a TPU, and no TPU or GPU that is not looked for."""

import importlib.util
import os
import subprocess
import sys

import pytest

from dynaip_jax import platforms


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """What JAX is told to look for ("": everything) on a machine with these files, plugins and variables."""

    def call(files=(), plugins=(), **variables):
        monkeypatch.setattr(platforms, "_plugins", lambda: set(plugins))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        monkeypatch.delitem(sys.modules, "jax", raising=False)
        monkeypatch.delenv(platforms.VARIABLE, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for name, text in dict(files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        platforms.leave_absent_tpus(tmp_path)
        return os.environ.get(platforms.VARIABLE, "")

    yield call
    monkeypatch.delenv(platforms.VARIABLE, raising=False)


def pci(vendor, kind):
    return {"sys/bus/pci/devices/0/vendor": f"{vendor}\n", "sys/bus/pci/devices/0/class": f"{kind}\n"}


def test_only_what_may_be_there_is_looked_for(chosen):
    assert chosen() == "cpu"
    assert chosen(pci("0x1ae0", "0x020000")) == "cpu"  # a network card
    assert chosen(plugins=["xla_cuda13"]) == "cpu"
    assert chosen({"dev/nvidia0": ""}) == "cpu"  # JAX is not installed for it
    assert chosen(plugins=["xla_cuda13"]) == "cuda,cpu"


def test_a_tpu_is_found(chosen):
    assert chosen(pci("0x1ae0", "0xff0000")) == ""
    assert chosen(pci("0x10de", "0x030000")) == "cpu"
    assert chosen({"dev/accel0": ""}) == ""


def test_what_is_not_known_is_left_alone(chosen, monkeypatch):
    assert chosen(plugins=["metal"]) == ""
    assert chosen(JAX_PLATFORMS="tpu") == "tpu"
    assert chosen(JAX_FORCE_TPU_INIT="1") == ""
    monkeypatch.delenv("JAX_FORCE_TPU_INIT")
    monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: None)
    platforms.leave_absent_tpus()
    assert platforms.VARIABLE not in os.environ


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_no_alarm():
    code = "from dynaip_jax.commandline import run_cli; run_cli(lambda _: print(__import__('jax').default_backend()))"
    env = {k: v for k, v in os.environ.items() if k != platforms.VARIABLE}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("cpu", "")
