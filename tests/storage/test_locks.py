"""Locks: who holds one, and what is left of one whose holder was killed."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from dynaip_jax.errors import UserError
from dynaip_jax.storage import locks
from dynaip_jax.storage.locks import hold, hold_in_bucket, holder_of

HOLD = """
import sys, time
from pathlib import Path
from dynaip_jax.storage.locks import hold
with hold(Path(sys.argv[1]), ValueError):
    print("held", flush=True)
    time.sleep(60)
"""


def refusal(holder):
    return UserError(f"held by {holder}")


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()


def test_another_process_is_named_and_its_death_lets_go(tmp_path, other):
    file = tmp_path / "lock"
    name = f"process {other.pid} on {socket.gethostname()} since 20"
    with pytest.raises(UserError, match=f"held by {name}"), hold(file, refusal):
        pass
    assert holder_of(file).startswith(name)
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert file.exists() and holder_of(file) is None
    with hold(file, refusal):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists() and holder_of(file) is None


def test_who_only_looks_keeps_no_writer_out(tmp_path):
    file = tmp_path / "lock"
    look = os.open(file, os.O_RDWR | os.O_CREAT)
    fcntl.flock(look, fcntl.LOCK_SH)  # as `holder_of` does, for a moment
    threading.Timer(locks.LOOK / 5, os.close, (look,)).start()
    with hold(file, refusal):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_a_thread_of_this_process_is_kept_out_too(tmp_path):
    file = tmp_path / "lock"
    with hold(file, refusal):
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), hold(file, refusal):
            pass
        assert file.exists()
    assert not file.exists()


@pytest.mark.parametrize("content", ["", "no JSON", "[1]", "[" * 4000, '{"pid": "\x1b[31m", "host": 1, "since": "x"}'])
def test_a_lock_that_says_nothing_is_taken_and_held(tmp_path, content):
    file = tmp_path / "lock"
    file.write_text(content)
    with hold(file, refusal):
        file.write_text(content)
        with pytest.raises(UserError, match="held by another process$"), hold(file, refusal):
            pass


def test_a_holder_that_has_just_begun_is_named(tmp_path, monkeypatch):
    """It has the lock, and not yet written who it is."""
    file, own, slow = tmp_path / "lock", locks._own_facts, threading.Event()

    def facts():
        slow.set()
        time.sleep(0.2)
        return own()

    def keep():
        with hold(file, refusal):
            done.wait(30)

    done = threading.Event()
    monkeypatch.setattr(locks, "_own_facts", facts)
    thread = threading.Thread(target=keep)
    thread.start()
    try:
        assert slow.wait(30)
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), hold(file, refusal):
            pass
    finally:
        done.set()
        thread.join()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError), hold(tmp_path / "lock", refusal):
        pass
    assert (tmp_path / "secret").read_text() == "mine" and holder_of(tmp_path / "lock") is None


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has none."""

    def unable(file, kind):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unable)
    monkeypatch.setattr(locks, "SETTLE", 0.01)


def test_without_locks_a_living_process_counts(tmp_path, without_locks):
    file = tmp_path / "lock"
    with hold(file, refusal):
        assert holder_of(file).startswith(f"process {os.getpid()} on")
        with pytest.raises(UserError, match=f"if it has ended, delete {file}"), hold(file, refusal):
            pass
        facts = json.loads(file.read_text())
    assert not file.exists()
    for change in (dict(pid=2**22 + 1), dict(began="0"), dict(pid=None)):  # a dead one; its number given to another
        file.write_text(json.dumps(facts | change))
        assert holder_of(file) is None
        with hold(file, refusal):
            pass
    file.write_text(json.dumps(facts | dict(host="elsewhere")))
    with pytest.raises(UserError, match="on elsewhere"), hold(file, refusal):
        pass
    assert file.exists()


def test_without_locks_two_that_begin_at_once_see_each_other(tmp_path, without_locks, monkeypatch):
    file = tmp_path / "lock"
    monkeypatch.setattr(locks.time, "sleep", lambda _: file.write_text('{"host": "other", "pid": 7, "since": 0}'))
    with pytest.raises(UserError, match="process 7 on other"), hold(file, refusal):
        pass
    assert file.exists()


@pytest.fixture
def object_(bucket, monkeypatch):
    """A lock in a bucket, whose holder shows life more often than usual."""
    monkeypatch.setattr(locks, "BEAT", 0.2)
    monkeypatch.setattr(locks, "SETTLE", 0.01)
    return epath.Path(bucket) / "run" / "lock"


def test_in_a_bucket_a_holder_that_lives_keeps_others_out(object_, monkeypatch, capsys):
    with hold_in_bucket(object_, refusal):
        with pytest.raises(UserError, match=f"held by process {os.getpid()} on"), hold_in_bucket(object_, refusal):
            pass
        facts = json.loads(object_.read_text())
        monkeypatch.setattr(locks.socket, "gethostname", lambda: "elsewhere")
        with (
            pytest.raises(UserError, match=f"process {facts['pid']} on {facts['host']}"),
            hold_in_bucket(object_, refusal),
        ):
            pass
        assert "to see whether it lives" in capsys.readouterr().err and object_.exists()
    assert not object_.exists()


def test_in_a_bucket_what_a_kill_left_is_taken(object_):
    gone = dict(host=socket.gethostname(), pid=2**22 + 1, began="1", since=0)
    for facts in (gone, gone | dict(host="elsewhere")):
        object_.write_text(json.dumps(facts))
        with hold_in_bucket(object_, refusal):
            assert json.loads(object_.read_text())["pid"] == os.getpid()
        assert not object_.exists()


def test_in_a_bucket_two_that_begin_at_once_see_each_other(object_, monkeypatch):
    monkeypatch.setattr(locks.time, "sleep", lambda _: object_.write_text('{"host": "other", "pid": 7, "since": 0}'))
    with pytest.raises(UserError, match="process 7 on other"), hold_in_bucket(object_, refusal):
        pass
    assert object_.exists()
