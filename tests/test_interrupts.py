"""Ctrl-C and SIGTERM end a command within seconds, also where the main thread does not come back to Python."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dynaip_jax import interrupts
from dynaip_jax.data.check import Limits
from dynaip_jax.shapeland import measure
from tools.convert_torch_weights import __main__ as converter
from train import cache, prepare

HEAD = """
import ctypes, os, sys, time
from pathlib import Path
from dynaip_jax.commandline import run_cli
from dynaip_jax.interrupts import at_stake, finishing, litter

def stuck():
    "As compiled code: signals do not end it, and Python runs no handler."
    mutex, library = ctypes.create_string_buffer(128), ctypes.CDLL(None)
    library.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    library.pthread_mutex_lock(mutex)

def ready(seconds=60):
    print("ready", flush=True)
    time.sleep(seconds)

def main(argv):
    folder = Path(argv[0])
    folder.mkdir()
    with at_stake("the picture is lost"), litter(folder):
"""
TAIL = """
sys.exit(run_cli(main))
"""


@pytest.fixture
def command(tmp_path):
    """Starts a command whose work is `body` and waits until it says that it is ready."""
    started = []

    def start(body):
        lines = "".join(f"        {line}\n" for line in body.splitlines())
        call = [sys.executable, "-c", HEAD + lines + TAIL, str(tmp_path / "work")]
        process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(0.5)  # it is about to be
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(process, *signals, gap=0.3):
    """Sends signals -> (exit status, stdout, stderr, seconds)."""
    began = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(gap)
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err, time.monotonic() - began


@pytest.mark.parametrize(
    "number, status, word", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_compiled_code_does_not_hold_it_up(command, tmp_path, number, status, word):
    found, _, err, seconds = ended(command("stuck()"), number)
    assert (found, err.strip()) == (status, f"{word}; the picture is lost") and seconds < 6
    assert not (tmp_path / "work").exists()


def test_the_second_signal_ends_it_at_once(command):
    found, _, err, seconds = ended(command("stuck()"), signal.SIGINT, signal.SIGINT)
    assert found == 130 and "interrupted; the picture is lost" in err and seconds < 1.9


def test_python_code_is_left_by_an_exception(command):
    body = "try:\n    ready()\nfinally:\n    print('left')"
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = command(body.replace("left", f"left {number}"))
        found, out, err, seconds = ended(process, number)
        assert (found, out) == (status, f"left {number}\n") and err.endswith("the picture is lost\n") and seconds < 2
        (path,) = {process.args[-1]}
        subprocess.run(["rmdir", path], check=True)


def test_what_is_being_saved_is_finished(command):
    body = "with finishing():\n    ready(0.5)\n    time.sleep(1)\n    print('saved')\nprint('more')"
    found, out, err, _ = ended(command(body), signal.SIGINT)
    assert (found, out) == (130, "saved\n") and "interrupted" in err


def test_an_error_made_of_an_interrupt_is_none(command):
    """As compiled code makes one of what is raised in a function that it calls."""
    body = "try:\n    ready()\nexcept KeyboardInterrupt as e:\n    raise RuntimeError('INTERNAL') from e"
    found, _, err, _ = ended(command(body), signal.SIGINT)
    assert (found, err) == (130, "interrupted; the picture is lost\n")


def test_what_does_not_end_by_itself_is_ended(command):
    """A thread that the interpreter would wait for."""
    body = "try:\n    ready()\nfinally:\n    stuck()"
    found, _, err, seconds = ended(command(body), signal.SIGTERM)
    assert found == 143 and "terminated; the picture is lost" in err and seconds < 13


def test_the_end_of_the_interpreter_does_not_hold_it_up(command):
    """What waits for compiled programs there waits for them to end."""
    body = (
        "class Program:\n    def __del__(self, stuck=stuck):\n        stuck()\n"
        "import atexit\natexit.register(lambda: print('exit'))\nsys.program = Program()\nready()"
    )
    found, out, err, seconds = ended(command(body), signal.SIGINT)
    assert (found, out, err) == (130, "exit\n", "interrupted; the picture is lost\n") and seconds < 5


def test_signals_of_a_forked_process_are_its_own(command):
    body = (
        "child = os.fork()\nif not child:\n    time.sleep(30)\n    os._exit(0)\ntime.sleep(0.3)\nos.kill(child, 15)\n"
        "_, status = os.waitpid(child, 0)\nready(4)\nprint(os.WTERMSIG(status))"
    )
    process = command(body)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "15\n", "")


def test_an_ignored_signal_stays_ignored(command):
    """As under nohup, or in the background of a script."""
    body = "ready(1.5)\nprint('done')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = command(body)
    finally:
        signal.signal(signal.SIGINT, before)
    found, out, err, _ = ended(process, signal.SIGINT)
    assert (found, out, err) == (0, "done\n", "")


# --- what commands say


@pytest.fixture
def loss():
    """What a call says that is interrupted where it calls `signals`."""

    def run(call):
        with pytest.raises(interrupts.Interrupted) as raised, interrupts.handled():
            call()
        return str(raised.value)

    return run


def signals(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


def test_cache_and_prepare_write_nothing(loss, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "write_dataset", signals)
    source = SimpleNamespace(entries=0, rows=[])
    said = loss(lambda: prepare.prepare(source, tmp_path / "data", Limits()))
    assert said == f"interrupted; nothing is written to {tmp_path / 'data'}"
    for name in ("Encoding", "open_data", "make_order"):
        monkeypatch.setattr(cache, name, lambda *_: SimpleNamespace(content=""))
    monkeypatch.setattr(cache.features, "facts", lambda *_: {})
    monkeypatch.setattr(cache, "make_parts", signals)
    monkeypatch.setattr(cache.Making, "numbers", [])
    monkeypatch.setattr("train.run.Run", lambda config: SimpleNamespace(encoder_identity=""))
    config = SimpleNamespace(data=None, batch=1, dtype="float32", distributed=SimpleNamespace(enabled=False))
    said = loss(lambda: cache.cache(config, tmp_path / "features"))
    kept = f"finished parts are kept in {tmp_path / '.features.parts'}; run the same command to go on"
    assert said == f"interrupted; {kept}"
    assert not [path.name for path in tmp_path.iterdir() if path.is_dir()]


def test_the_converter_writes_nothing(loss, tmp_path, monkeypatch):
    monkeypatch.setattr(converter, "LAYOUTS", [SimpleNamespace(family="x", manifest=lambda *_: {})])
    monkeypatch.setattr(converter, "write_bundle", signals)
    said = loss(lambda: converter.convert([], [], tmp_path / "bundle"))
    assert said == f"interrupted; nothing is written to {tmp_path / 'bundle'}" and not list(tmp_path.iterdir())


def test_the_evaluator_counts_its_rows(loss, monkeypatch):
    rows = ["true-render", "reference-pasted"]
    monkeypatch.setattr(measure, "check", lambda *_: rows)
    monkeypatch.setattr(measure, "scores", lambda *_: (np.ones(2), np.ones(2)))
    monkeypatch.setattr(measure, "draw", lambda pipe, cases, setting, *_: setting.source == "references" and signals())
    said = loss(lambda: measure.evaluate(SimpleNamespace(model=None), None, rows, [1], num=2, calibrations={1: 1}))
    assert said == "interrupted; 1 of 2 rows were measured, and are lost"


def test_every_command_heeds_signals():
    root = Path(__file__).parent.parent
    for folder in ("train", "tools"):
        for path in (root / folder).rglob("*.py"):
            _, main, last = path.read_text().partition('if __name__ == "__main__":')
            assert not main or "sys.exit(run_cli(main" in last, path
