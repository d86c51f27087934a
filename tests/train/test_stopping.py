"""What a signal does at any moment, in a process that loads, computes in compiled code, trains or saves."""

import signal
import subprocess
import sys
import time

import pytest

from tests.train.runs import ROOT
from train.stopping import Stop, Stopped

SCRIPT = """
import sys, time, ctypes
from train import stopping
stopping.GRACE = 0.5
with stopping.Stop() as stop:
    try:
        {before}
        print("ready", flush=True)
        {body}
    except stopping.Stopped:
        print("came back", flush=True)
sys.exit(stop.status)
"""
UNHEARD = (
    "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [15])"  # by the main thread: no call of it returns early
)
LOOP = "stop.waits_for = 'the step'"
NOTED = "[time.sleep(0.05) for _ in iter(lambda: stop.asked, 'SIGTERM')]"


@pytest.fixture
def child():
    children = []

    def start(before, body):
        script = SCRIPT.format(before=before or "pass", body=body)
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        children.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in children:
        process.kill()
        process.communicate()


def end(process):
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_while_there_is_nothing_to_save(child, name):
    number = signal.Signals[name]
    process = child("", "time.sleep(60)")
    process.send_signal(number)
    assert end(process) == (128 + number, "came back\n", "")


def test_in_compiled_code_with_nothing_to_save(child):
    process = child(f"{UNHEARD}; libc = ctypes.CDLL(None)", "libc.sleep(60)")
    time.sleep(1)  # until it is in there
    process.send_signal(signal.SIGTERM)
    said = "ended by SIGTERM after 0.5 s in which compiled code did not return; there was nothing to save\n"
    assert end(process) == (143, "", said)


def test_in_the_loop_it_is_noted_and_said(child):
    process = child(LOOP, NOTED)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (143, "", "SIGTERM: waits for the step; a second one ends the run at once\n")


def test_the_second_ends_it_at_once(child):
    process = child(LOOP, "[time.sleep(1) for _ in range(60)]")
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: waits for the step")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    status, _, err = end(process)
    assert status == 130 and time.monotonic() - began < 5
    assert err == "ended by a second signal, SIGINT; steps since the last checkpoint are lost\n"


def test_one_that_comes_with_the_last_step_ends_nothing_early(child):
    process = child(LOOP, f"{NOTED}; stop.finished()")
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 0


def test_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Stop() as stop:
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
            time.sleep(1)
        assert stop.asked == "SIGTERM" and stop.status == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1
