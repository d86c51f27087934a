"""Processes that have joined end together: one fails, one is killed, one is stopped."""

import signal
import socket
import sys
import time

import pytest

from dynaip_jax.commandline import run_cli
from dynaip_jax.errors import UserError
from tests.train.runs import Child
from train.config import DistributedConfig
from train.processes import joined
from train.stopping import Stop, Stopped, barrier

CALL = "import sys; from tests.train.test_processes import process; process(*sys.argv[1:])"
TIMEOUT = 4.0


def process(port, index, fails):
    """In one of two children: both meet, then 0 waits for 1, which sleeps or fails."""

    def main(argv):
        with Stop() as stop:
            try:
                with joined(DistributedConfig(True, f"localhost:{port}", 2, int(index), TIMEOUT), stop):
                    barrier("both")
                    print("ready", file=sys.stderr, flush=True)
                    if index == "0":
                        barrier("never")
                    if fails == "fails":
                        raise UserError("dataset missing; expected one; look for it")
                    time.sleep(600)
            except Stopped:
                print(f"stopped by {stop.asked}", file=sys.stderr)
            return stop.status

    sys.exit(run_cli(main, []))


@pytest.fixture
def two(tmp_path):
    """Starts both, and waits until they have met."""
    children = []

    def start(fails=""):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        env = dict(JAX_NUM_CPU_DEVICES="1")
        children.extend(Child(env, tmp_path / f"log{n}", "-c", CALL, port, n, fails) for n in (0, 1))
        for child in children:
            while not child.says("ready") and child.process.poll() is None:
                time.sleep(0.05)
        return children

    yield start
    for child in children:
        child.process.kill()
        child.process.wait()


def last_word(child):
    errors = [line for line in child.lines() if line.startswith("error: ")]
    assert len(errors) == 1, child.log.read_text()
    return errors[0]


END = "; this process ends too; the last whole checkpoint is kept, go on with --resume"


def named(child):
    return f"error: process 1 on {socket.gethostname()}, process id {child.process.pid},"


def test_one_fails(two):
    zero, one = two("fails")
    assert one.end() == 2 and zero.end() == 1
    assert last_word(one) == "error: dataset missing; expected one; look for it"
    assert last_word(zero) == f"{named(one)} ended: dataset missing; expected one; look for it{END}"


def test_one_is_killed(two):
    zero, one = two()
    one.process.kill()
    began = time.monotonic()
    assert zero.end() == 1 and time.monotonic() - began < 5 * TIMEOUT
    assert last_word(zero) == f"{named(one)} shows no sign of life since 4 s (--distributed.timeout){END}"


def test_one_hangs(two):
    """As far as the others can tell: it is stopped, and its connections stay."""
    zero, one = two()
    one.process.send_signal(signal.SIGSTOP)
    assert zero.end() == 1
    assert last_word(zero).startswith(f"{named(one)} shows no sign of life")
    one.process.send_signal(signal.SIGCONT)
    assert one.end() == 1 and last_word(one).startswith("error: process 0")


def test_the_one_that_the_others_meet_at_is_killed(two):
    zero, one = two()
    zero.process.kill()
    assert one.end() == 1
    assert last_word(one).startswith("error: process 0, at localhost:") and last_word(one).endswith(f"is gone{END}")


def test_one_is_stopped_while_there_is_nothing_to_save(two):
    zero, one = two()
    one.process.send_signal(signal.SIGTERM)
    assert one.end() == 143 and zero.end() == 1
    assert one.lines()[-1] == "stopped by SIGTERM" and last_word(zero) == f"{named(one)} ended: Stopped{END}"
