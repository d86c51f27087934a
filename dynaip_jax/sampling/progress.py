"""Progress of a generation: what it is doing, and each step, which the compiled program itself reports."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from dynaip_jax.tasks import task

Watcher = Callable[[], object]
Viewer = Callable[[int, np.ndarray, np.ndarray], object]  # (step from 0, its latents, the clean ones as expected there)
_watches: dict[
    int, Watch
] = {}  # by ticket; compiled programs outlive their callers, so they hold a number, not a function
_tickets = itertools.count()
_log = logging.getLogger("jax._src.debugging")  # where JAX writes of a callback that raises


class Watch:
    """Who is told of the steps of one run of a program; what they raise ends the run, and is kept in `error`."""

    def __init__(self, watcher: Watcher, viewer: Viewer | None):
        self._watcher, self._viewer = watcher, viewer
        self.error: Exception | None = None

    def __call__(self, *seen: np.ndarray) -> None:
        try:
            self._watcher()
            if self._viewer is not None and seen:
                step, latents, expected = seen
                self._viewer(int(step), np.asarray(latents), np.asarray(expected))
        except Exception as e:
            self.error = e
            raise

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is to be logged: not that the run was ended on purpose."""
        return self.error is None or not record.exc_info or record.exc_info[1] is not self.error


def step_done(ticket: jax.Array, *seen: jax.Array) -> None:
    """Called by a program, on the host, at each step; `ticket`: int32, from `watching`; `seen`: what a `Viewer` takes, or nothing."""
    if watch := _watches.get(int(ticket)):
        watch(*seen)  # type: ignore[arg-type]  # the host gets arrays of NumPy's interface


@contextlib.contextmanager
def watching(watcher: Watcher | None, viewer: Viewer | None = None) -> Iterator[int | None]:
    """The ticket of a program to be started in the block, whose steps `watcher` and `viewer` are called for; None for no watcher.

    What they raise ends the program at that step, and is raised from the block.
    """
    if watcher is None:
        yield None
        return
    ticket, watch = next(_tickets), Watch(watcher, viewer)
    _watches[ticket] = watch
    _log.addFilter(watch)
    try:
        yield ticket
        jax.effects_barrier()
    except Exception as e:
        if watch.error is None or e is watch.error:
            raise
        raise watch.error from None
    finally:
        _log.removeFilter(watch)
        del _watches[ticket]


@dataclass(frozen=True)
class Progress:
    """What is told of a generation: with `show`, its phases on stderr, and on a terminal its steps; `step` is called at each step,
    `view` with its latents too. What either raises ends the generation at that step, and is raised by it.

    Steps cost something: JAX keeps no program on disk that calls back. Where nobody watches, they are not counted.
    """

    show: bool = False
    step: Watcher | None = None
    view: Viewer | None = None

    @classmethod
    def of(cls, asked: bool | Watcher | Progress) -> Progress:
        """`asked`: whether to show it, or what to call at each step."""
        if isinstance(asked, Progress):
            return asked
        return cls(step=asked) if callable(asked) else cls(show=bool(asked))

    def doing(self, text: str) -> contextlib.AbstractContextManager[object]:
        """The block is a phase of its own."""
        return task(text, show=self.show)

    @property
    def counts(self) -> bool:
        """Whether the program is to report its steps."""
        watched = self.step is not None or self.view is not None
        return watched or (self.show and sys.stderr.isatty())

    @contextlib.contextmanager
    def denoising(self, steps: int) -> Iterator[Watcher | None]:
        """What is to be called at each of the steps, if anything."""
        if not self.show or not self.counts:
            with self.doing(f"denoising, {steps} steps"):
                yield self.step or (_nothing if self.view is not None else None)
            return
        with task("denoising", steps) as count:
            yield count


def _nothing() -> None:
    pass


SILENT = Progress()
