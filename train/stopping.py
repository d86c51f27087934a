"""How a run ends early, and how its processes wait for each other. Imports no JAX, so that signals are heeded while it loads."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

HEEDED = (signal.SIGTERM, signal.SIGINT)
GRACE = 5.0  # seconds in which a run that has nothing to save is to have ended by itself


class Stopped(KeyboardInterrupt):
    """Raised by a signal that comes while there is nothing to save."""


class Stop:
    """Heeds SIGTERM (preemption) and SIGINT while the block runs.

    While the run has nothing to save (it loads, or compiles its first step; `waits_for` is empty), the first signal raises
    `Stopped`, and a process that waits for compiled code ends after `GRACE` seconds. Once `waits_for` says what a signal waits for,
    it is noted and that is said: the run goes on to the end of a step and saves. A second signal ends the process at once.

    `status` is the exit status: 128 + the signal's number if it ended the run early, else 0.
    """

    def __init__(self) -> None:
        self.asked = ""  # the signal's name
        self.waits_for = ""
        self._count, self._several = 0, False
        self._jax_handler: Callable[[int], None] | None = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Stop:
        self._here = threading.current_thread() is threading.main_thread()
        if self._here:
            self._ear, self._mouth = socket.socketpair()
            self._mouth.setblocking(False)
            self._before = {number: signal.signal(number, self._note) for number in HEEDED}
            self._wakeup = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._here:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._mouth.close()  # ends the thread
            self._thread.join()
            self._ear.close()
            if self._timer is not None:
                self._timer.cancel()

    @property
    def status(self) -> int:
        return 128 + signal.Signals[self.asked] if self.asked else 0

    def finished(self) -> None:
        """The last step is done: a signal that came meanwhile ends nothing early."""
        self.asked = ""

    def join_processes(self) -> None:
        """To be called once JAX has joined the other processes: it watches SIGTERM by itself, so that all of them stop after the same
        step. That stays so, but signals come here first."""
        self._several = True
        if not self._here:
            return
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        theirs = libc.signal(int(signal.SIGTERM), ctypes.c_void_p(int(signal.SIG_IGN)))
        if theirs not in (None, int(signal.SIG_DFL), int(signal.SIG_IGN)):
            self._jax_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(theirs)
        signal.signal(signal.SIGTERM, self._note)

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`; all processes get the same answer."""
        import jax

        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.asked = self.asked or signal.SIGTERM.name
                return True
            return False
        return bool(self.asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        if not self.waits_for or (self._several and self._jax_handler is None):
            raise Stopped
        if self._jax_handler is not None:
            self._jax_handler(int(signal.SIGTERM))

    def _watch(self) -> None:
        """Says what a signal does, and ends the process where Python cannot, since it waits for compiled code."""
        while received := self._ear.recv(1):
            if received[0] not in HEEDED:
                continue
            name = signal.Signals(received[0]).name
            self._count += 1
            if self._count > 1:
                self._end(received[0], f"ended by a second signal, {name}; steps since the last checkpoint are lost")
            elif self.waits_for:
                self._say(f"{name}: waits for {self.waits_for}; a second one ends the run at once")
            else:
                line = f"ended by {name} after {GRACE:g} s in which compiled code did not return; there was nothing to save"
                self._timer = threading.Timer(GRACE, self._end, (received[0], line))
                self._timer.daemon = True
                self._timer.start()

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def _end(self, number: int, line: str) -> None:
        self._say(line)
        os._exit(128 + number)


def barrier(name: str) -> None:
    """Until all processes are here."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
