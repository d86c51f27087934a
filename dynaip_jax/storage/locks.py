"""One writer at a time: a file that says who holds it, and of which the system lets go when that process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from dynaip_jax.errors import UserError
from dynaip_jax.reading import parse_json

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}  # a file system without locks
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
LOOK = 0.05  # seconds that a writer waits for those who only look who holds a lock
SETTLE = 0.5  # seconds after which two that began at once see each other, where there are no locks
BEAT = 20.0  # seconds between two signs of life of a holder in a bucket


@contextlib.contextmanager
def hold(file: Path, refusal: Callable[[str], UserError]) -> Iterator[None]:
    """Holds the lock `file` while the block runs, then removes it.

    Raises `refusal(holder)` at once if another process, or another thread, holds it. A file left by a process that was killed is no
    lock. Where the file system has no locks, the file counts as long as its process lives; whether one on another host does cannot
    be known, and the refusal says which file to delete if it does not.
    """
    lock, locked = _opened(file)
    try:
        if locked is False:
            raise refusal(_holder(file))
        if locked is None and _may_live(_facts(file)):
            raise refusal(f"{_told(_facts(file))}; if it has ended, delete {file}")
        own = _own_facts()
        os.ftruncate(lock, 0)
        try:
            os.pwrite(lock, json.dumps(own).encode(), 0)
            if locked is None:
                time.sleep(SETTLE)
                locked = _facts(file) == own
                if not locked:
                    raise refusal(_told(_facts(file)))
            yield
        finally:
            if locked:
                file.unlink(missing_ok=True)  # while it is held: who opened it a moment ago sees that it is gone
    finally:
        os.close(lock)


@contextlib.contextmanager
def hold_in_bucket(file: epath.Path, refusal: Callable[[str], UserError]) -> Iterator[None]:
    """As `hold`, in a bucket, which has no locks: the holder writes the file anew every `BEAT` seconds, and one that others do not see
    change in two and a half times as long was left by a kill. So a dead holder of another host keeps the next one waiting that long."""
    other = _facts(file)
    if other.get("host") == socket.gethostname():
        if _may_live(other):
            raise refusal(_told(other))
    elif other:
        print(f"{file}: left by {_told(other)}; waits for {2.5 * BEAT:g} s to see whether it lives", file=sys.stderr)
        time.sleep(2.5 * BEAT)
        if _facts(file) not in (other, {}):
            raise refusal(_told(_facts(file)))
    own, over = _own_facts(), threading.Event()
    file.write_text(json.dumps(own))
    time.sleep(SETTLE)
    if _facts(file) != own:
        raise refusal(_told(_facts(file)))

    def beat() -> None:
        while not over.wait(BEAT):
            with contextlib.suppress(Exception):  # the next one may reach the bucket
                file.write_text(json.dumps(own | dict(alive=time.time())))

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        file.unlink(missing_ok=True)


def _own_facts() -> dict[str, Any]:
    return dict(host=socket.gethostname(), pid=os.getpid(), began=_began(os.getpid()), since=time.time())


def holder_of(file: Path) -> str | None:
    """Who holds the lock `file`; None if nobody does. Changes nothing."""
    try:
        lock = os.open(file, os.O_RDONLY | _NO_LINK)
    except OSError:
        return None
    try:
        locked = _locked(lock, fcntl.LOCK_SH)
        held = locked is False or (locked is None and _may_live(_facts(file)))
        return _holder(file) if held else None
    finally:
        os.close(lock)


def _opened(file: Path) -> tuple[int, bool | None]:
    """The open file, and whether it is locked now; None where there are no locks."""
    until = time.monotonic() + LOOK
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        try:
            locked = _locked(lock, fcntl.LOCK_EX)
            if locked is False and time.monotonic() < until:
                time.sleep(LOOK / 10)
            elif not locked or os.path.samestat(os.fstat(lock), os.stat(file)):
                return lock, locked
        except FileNotFoundError:
            pass  # its holder has just removed it
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _locked(file: int, kind: int) -> bool | None:
    """Locks an open file: True; False if another has; None where there are no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _holder(file: Path) -> str:
    """Who holds a lock, as it says itself; one that has just taken it has a moment to write that."""
    until = time.monotonic() + SETTLE
    while not (facts := _facts(file)) and time.monotonic() < until:
        time.sleep(0.01)
    return _told(facts)


def _facts(file: Path | epath.Path) -> dict[str, Any]:
    """What the lock says of its holder; empty if it says nothing."""
    try:
        with file.open("rb") as f:
            facts = parse_json(f.read(4096))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _told(facts: dict[str, Any]) -> str:
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["since"]))
        host = "".join(c for c in str(facts["host"])[:60] if c.isprintable())
        return f"process {int(facts['pid'])} on {host} since {since}"
    except (KeyError, ValueError, TypeError, OverflowError, OSError):
        return "another process"


def _may_live(facts: dict[str, Any]) -> bool:
    """Whether the process that `facts` tell of can be alive."""
    if facts.get("host") != socket.gethostname():
        return bool(facts)
    try:
        os.kill(facts["pid"], 0)
    except PermissionError:
        return True
    except (OSError, KeyError, TypeError, OverflowError):
        return False
    return facts.get("began") == _began(facts["pid"])


def _began(pid: int) -> str:
    """When a process began, in the system's own ticks: a later one may have the same number. Empty where that is not told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
