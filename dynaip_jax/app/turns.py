"""Work that is done one after the other, for several who wait: a queue with a limit, in which each may be cancelled."""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynaip_jax.commandline import unforeseen
from dynaip_jax.errors import UserError, reason

WAITING, WORKING, DONE, FAILED, CANCELLED = "waiting", "working", "done", "failed", "cancelled"
OVER = (DONE, FAILED, CANCELLED)


class Cancelled(Exception):
    """Raised by `Job.step` in the work of a job that is no longer wanted."""


@dataclass(frozen=True)
class Snapshot:
    """How a job stands: its `state`; how many are `ahead` of it; `step` of `steps` and what is to be shown of it; `result` or `error`."""

    state: str
    ahead: int = 0
    step: int = 0
    steps: int = 0
    shown: Any = None
    result: Any = None
    error: UserError | None = None


class Job:
    """A piece of `work`, which is called with the job itself and calls `step` now and then."""

    def __init__(self, work: Callable[[Job], Any]):
        self._work, self._lock = work, threading.Lock()
        self._now, self._wanted = Snapshot(WAITING), True

    def step(self, step: int, steps: int, shown: Any = None) -> None:
        """Says how far the work is. Raises `Cancelled` if it is no longer wanted."""
        with self._lock:
            if not self._wanted:
                raise Cancelled
            self._now = Snapshot(WORKING, step=step, steps=steps, shown=shown)

    def cancel(self) -> None:
        """The work ends at its next step, or never begins; nothing for a job that is over."""
        with self._lock:
            self._wanted = False
            if self._now.state == WAITING:
                self._now = Snapshot(CANCELLED)

    @property
    def now(self) -> Snapshot:
        """How it stands, but for who is ahead of it."""
        with self._lock:
            return self._now

    def run(self) -> None:
        """Does the work; whatever it raises is kept."""
        with self._lock:
            if self._now.state != WAITING:
                return
            self._now = Snapshot(WORKING)
        try:
            end = Snapshot(DONE, result=self._work(self))
        except Cancelled:
            end = Snapshot(CANCELLED)
        except UserError as e:
            end = Snapshot(FAILED, error=e)
        except (OSError, MemoryError, RecursionError) as e:
            end = Snapshot(FAILED, error=unforeseen(e))
        except Exception as e:
            traceback.print_exc(file=sys.stderr)
            end = Snapshot(
                FAILED, error=UserError(f"a fault of the program ({reason(e)}); its log says more; try again")
            )
        with self._lock:
            self._now = end


class Turns:
    """One thread that does jobs in the order in which they came; at most `most` wait."""

    def __init__(self, most: int):
        self._most, self._waiting = most, deque[Job]()
        self._current: Job | None = None
        self._changed, self._open = threading.Condition(), True
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """A job that waits for its turn. Raises `UserError` if too many do."""
        job = Job(work)
        with self._changed:
            self._forget_cancelled()
            if len(self._waiting) >= self._most:
                raise UserError(
                    f"queue: {len(self._waiting)} pictures wait already; expected fewer than {self._most + 1}; try again in a minute"
                )
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def snapshot(self, job: Job) -> Snapshot:
        """How a job stands."""
        now = job.now
        if now.state != WAITING:
            return now
        with self._changed:
            self._forget_cancelled()
            ahead = self._waiting.index(job) if job in self._waiting else 0
            return Snapshot(WAITING, ahead=ahead + (self._current is not None))

    def close(self) -> None:
        """Cancels all jobs and ends the thread."""
        with self._changed:
            self._open = False
            for job in (*self._waiting, *([self._current] if self._current else [])):
                job.cancel()
            self._changed.notify_all()
        self._thread.join()

    def _forget_cancelled(self) -> None:
        self._waiting = deque(job for job in self._waiting if job.now.state == WAITING)

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.wait_for(lambda: self._waiting or not self._open)
                if not self._open:
                    return
                job = self._current = self._waiting.popleft()
            job.run()
