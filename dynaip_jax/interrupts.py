"""Ctrl-C and SIGTERM while a command runs: it ends within seconds, whatever it is in, and says what is lost.

Python runs the handler of a signal when the main thread comes back to Python. From a compiled program, or its compilation, that may
take minutes. So a second thread hears of each signal at once, and ends the process itself if the main thread does not.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

GRACE = 2.0  # seconds that the main thread has to come back to Python
UNWIND = 8.0  # seconds that it then has to leave what it was in
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
USUAL = (signal.default_int_handler, signal.SIG_DFL)  # handlers that are replaced; others are somebody's own

Loss = Callable[[], str]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised in the main thread; `number`: of the signal. The message is for the user."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


class _Watch:
    """The signals of one command, between `start` and `stop`."""

    def __init__(self) -> None:
        self.number, self.finishing = 0, 0  # the first signal, and how many blocks are to end before it acts
        self.said = ""  # once it has
        self.losses: list[Loss] = []
        self.litter: list[Path] = []
        self._heard, self._left = threading.Event(), threading.Event()
        self._before: dict[int, Any] = {}

    def start(self) -> None:
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._writer = writer
        for number in WORDS:
            if signal.getsignal(number) in USUAL:
                self._before[number] = signal.signal(number, self.note)
        threading.Thread(target=self._listen, daemon=True).start()

    def stop(self) -> None:
        """Gives the signals back."""
        self._left.set()
        for number, handler in self._before.items():
            if signal.getsignal(number) == self.note:
                signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._writer)

    def forget(self) -> None:
        """In a forked process, whose signals are its own."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self._heard.set()
        if self.number:  # the second one, at which the process ends without the main thread
            return
        self.number = number
        if not self.finishing:
            self.act()

    def act(self) -> None:
        self.said = self.message(self.number)
        raise Interrupted(self.number, self.said)

    def message(self, number: int) -> str:
        """What happened, and what is lost by it."""
        return "; ".join([WORDS[signal.Signals(number)], *filter(None, (loss() for loss in self.losses))])

    def _listen(self) -> None:
        heard = 0
        with open(self._reader, "rb", buffering=0) as reader:
            while byte := reader.read(1):
                number = byte[0]
                if signal.getsignal(number) != self.note:
                    continue
                heard += 1
                if heard > 1:
                    self._end(number)
                threading.Thread(target=self._limit, args=(number,), daemon=True).start()

    def _limit(self, number: int) -> None:
        if self._heard.wait(GRACE):
            while not self._left.wait(UNWIND) and self.finishing:
                pass
        if not self._left.is_set():
            self._end(number)

    def _end(self, number: int) -> None:
        """Ends the process, whatever the main thread is in."""
        os.write(2, f"\n{self.said or self.message(number)}\n".encode(errors="replace"))
        for folder in self.litter:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + number)


_watch: _Watch | None = None
_status = 0


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise `Interrupted` in the block, or end the process if it does not come back to Python. Nothing changes
    outside the main thread, within another such block, and for signals that have a handler of their own or are ignored."""
    global _watch
    if _watch is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _watch = _Watch()
    watch.start()
    try:
        yield
    except Exception as e:
        if watch.number:  # compiled code makes an error of its own of one that is raised below it
            raise Interrupted(watch.number, watch.said or watch.message(watch.number)) from e
        raise
    finally:
        watch.stop()
        _watch = None


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """A signal waits until the block has ended; a second one does not. For saving what is done."""
    watch = _watch if threading.current_thread() is threading.main_thread() else None
    if watch is None:
        yield
        return
    watch.finishing += 1
    try:
        yield
    finally:
        watch.finishing -= 1
        if watch.number and not watch.finishing and sys.exc_info()[0] is None:
            watch.act()


@contextlib.contextmanager
def at_stake(loss: Loss | str) -> Iterator[None]:
    """`loss`: what is lost if the block is interrupted, "" for nothing; asked for at that moment."""
    with _listed([] if _watch is None else _watch.losses, (lambda: loss) if isinstance(loss, str) else loss):
        yield


@contextlib.contextmanager
def litter(folder: Path) -> Iterator[None]:
    """`folder` is to go if the process is ended in the block without coming back to it."""
    with _listed([] if _watch is None else _watch.litter, folder):
        yield


@contextlib.contextmanager
def _listed(items: list, item: object) -> Iterator[None]:
    items.append(item)
    try:
        yield
    finally:
        items.remove(item)


def leave(number: int) -> None:
    """Has the interpreter end, when it does, with the status of a signal and without waiting for programs that still run."""
    global _status
    _status = 128 + number
    atexit.register(_limit_exit)  # the last one is called first


def _limit_exit() -> None:
    timer = threading.Timer(GRACE, os._exit, (_status,))
    timer.daemon = True
    timer.start()


def _exit() -> None:
    if _status:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(_status)


def _forked() -> None:
    global _watch
    if _watch is not None:
        _watch.forget()
        _watch = None


os.register_at_fork(after_in_child=_forked)
atexit.register(
    _exit
)  # the first one is called last: what comes then waits for programs, and no other thread runs any more
