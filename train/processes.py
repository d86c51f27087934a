"""Several processes of one run: how they find each other, and how they end together."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from dynaip_jax.errors import UserError
from train.config import DistributedConfig
from train.stopping import Stop

# Signs of life within the time after which a process counts as dead; seconds between two at most.
BEATS, LONGEST = 5, 2.0
LEAVING = 60.0  # seconds for a process that failed to say so, after the coordinator is gone
SAME = 15.0  # seconds at most for a process to fail of what another one failed of
# In errors of JAX.
TALKING = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|[Bb]arrier|[Cc]onnection|coordination")
ALIVE, ENDED = "dynaip/alive", "dynaip/ended"  # folders in the coordinator's table


@contextlib.contextmanager
def joined(config: DistributedConfig, stop: Stop) -> Iterator[None]:
    """Joins the other processes of the run, if there are any; if the block fails in one of them, or one dies, none goes on.

    Raises `UserError` if they do not find each other.
    """
    if not config.enabled:
        if config != DistributedConfig():
            raise UserError("--distributed: has values but is not enabled; pass --distributed.enabled too")
        yield
        return
    _initialize(config)
    from train.agreement import agree_on_compiled

    stop.join_processes()
    others = Others(config.timeout)
    try:
        with others:
            agree_on_compiled()
            yield
    except BaseException as e:
        # Runs before JAX's own exit, which would wait for the others while they wait for this process.
        atexit.register(others.leave, 2 if isinstance(e, UserError) else stop.status or 1)
        raise


def _initialize(config: DistributedConfig) -> None:
    import jax

    given: dict[str, Any] = {}
    if config.coordinator:
        given = dict(coordinator_address=config.coordinator, num_processes=config.processes, process_id=config.index)
        if not 0 <= config.index < config.processes:
            raise UserError(
                f"--distributed.index {config.index} of --distributed.processes {config.processes}: expected at least 1 "
                "process, and indices from 0; give each process its own"
            )
    try:
        later = max(100, int(3 * config.timeout))  # JAX aborts a process without a word of which other one died
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=later)
    except (RuntimeError, ValueError) as e:
        raise UserError(
            f"--distributed: the processes did not find each other ({str(e)[:120]}); check --distributed.coordinator "
            "HOST:PORT, .processes and .index"
        ) from e


class Others:
    """Ends this process, with a line that names the other, if another process of the run fails, or shows no sign of life for `timeout`
    seconds. Each shows its own in the table of JAX's coordinator while the block runs."""

    def __init__(self, timeout: float):
        from jax._src.distributed import global_state  # has no public name; Orbax takes it from there too

        client: Any = global_state.client
        self._timeout, self._client, self._same = timeout, client, min(SAME, timeout / 2)
        self._own, self._count = global_state.process_id, global_state.num_processes or 1
        self._coordinator = str(global_state.coordinator_address)
        self._abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._before_abort)
        self._over, self._told, self._leaving = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="processes", daemon=True)

    def __enter__(self) -> Others:
        self._show(ALIVE, f"0 {socket.gethostname()} {os.getpid()}")
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._abort)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and TALKING.search(str(error)):
            self._thread.join(
                1.5 * self._timeout
            )  # talking to another process failed: this ends here if that one is dead
        self._over.set()
        self._thread.join()
        if error is not None:
            reason = str(error) if isinstance(error, UserError) else type(error).__name__
            self._say(" ".join(reason.split())[:200], 2 * self._same)
        else:
            ctypes.CDLL(None).signal(int(signal.SIGABRT), ctypes.c_void_p(int(signal.SIG_DFL)))
            self._show(ENDED, "")

    def _say(self, reason: str, patience: float) -> None:
        """Tells the others why this process ends, and waits until they end too: they may yet read what it sent, and fail of the same. For
        `patience` seconds at most, and no longer than the coordinator is there: a call to one that is gone never returns, hence the thread."""

        def tell() -> None:
            with contextlib.suppress(Exception):  # the coordinator may be what is gone
                self._show(ENDED, reason)
                for other in set(range(self._count)) - {self._own}:
                    self._client.blocking_key_value_get(f"{ENDED}/{other}", int(1000 * patience))
            self._told.set()

        self._leaving = True
        threading.Thread(target=tell, daemon=True).start()
        self._told.wait(patience)

    def leave(self, status: int) -> None:
        """Ends a process whose block failed."""
        os._exit(status)

    def _show(self, folder: str, text: str) -> None:
        self._client.key_value_set(f"{folder}/{self._own}", text, allow_overwrite=True)

    def _read(self, folder: str) -> dict[int, str]:
        return {int(key.rpartition("/")[2]): text for key, text in self._client.key_value_dir_get(folder)}

    def _watch(self) -> None:
        began = reached = time.monotonic()
        seen: dict[int, tuple[str, float]] = {}  # the last sign of life of each, and when it was new
        beat = 0
        while not self._over.wait(min(self._timeout / BEATS, LONGEST)):
            now, beat = time.monotonic(), beat + 1
            try:
                self._show(ALIVE, f"{beat} {socket.gethostname()} {os.getpid()}")
                alive, ended = self._read(ALIVE), self._read(ENDED)
            except Exception as e:  # of jaxlib's own kinds
                if now - reached > self._timeout:
                    self._end(f"process 0, which the others meet at, cannot be reached ({str(e)[:80]})")
                continue
            reached = now
            for other in range(self._count):
                sign = alive.get(other, "")
                name = f"process {other}" + (" on {1}, process id {2},".format(*sign.split()) if sign else "")
                if ended.get(other) and not self._over.wait(self._same):  # this one may be about to fail of the same
                    self._say(f"process {other} ended", LONGEST)
                    self._end(f"{name} ended: {ended[other]}")
                if sign != seen.get(other, ("", began))[0]:
                    seen[other] = sign, now
                elif other not in ended and now - seen.get(other, ("", began))[1] > self._timeout:
                    self._end(f"{name} shows no sign of life since {self._timeout:g} s (--distributed.timeout)")

    def _before_abort(self, number: int) -> None:
        """JAX aborts the process, in a thread of its own, as soon as its coordinator is gone, and names nobody."""
        if self._leaving:
            self._told.set()  # as far as that went
            time.sleep(LEAVING)  # another thread says what failed, and leaves
        host, _, port = self._coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            self._end(f"process 0, at {self._coordinator}, is gone")

    def _end(self, what: str) -> None:
        """Ends the process without leave of the main thread, which may wait for the other one in compiled code."""
        print(
            f"error: {what}; this process ends too; the last whole checkpoint is kept, go on with --resume",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
