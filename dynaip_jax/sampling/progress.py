"""Progress of a generation: what it is doing, and each step, which the compiled program itself reports."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax

from dynaip_jax.tasks import task

Watcher = Callable[[], object]
_watchers: dict[
    int, Watcher
] = {}  # by ticket; compiled programs outlive their callers, so they hold a number, not a function
_tickets = itertools.count()


def step_done(ticket: jax.Array) -> None:
    """Called by a program, on the host, at each step; `ticket`: int32, from `watching`."""
    if watcher := _watchers.get(int(ticket)):
        watcher()


@contextlib.contextmanager
def watching(watcher: Watcher | None) -> Iterator[int | None]:
    """The ticket of a program to be started in the block, whose steps `watcher` is called for; None for no watcher."""
    if watcher is None:
        yield None
        return
    ticket = next(_tickets)
    _watchers[ticket] = watcher
    try:
        yield ticket
        jax.effects_barrier()
    finally:
        del _watchers[ticket]


@dataclass(frozen=True)
class Progress:
    """What is told of a generation: with `show`, its phases on stderr, and on a terminal its steps; `step` is called at each step.

    Steps cost something: JAX keeps no program on disk that calls back. Where nobody watches, they are not counted.
    """

    show: bool = False
    step: Watcher | None = None

    @classmethod
    def of(cls, asked: bool | Watcher) -> Progress:
        """`asked`: whether to show it, or what to call at each step."""
        return cls(step=asked) if callable(asked) else cls(show=bool(asked))

    def doing(self, text: str) -> contextlib.AbstractContextManager[object]:
        """The block is a phase of its own."""
        return task(text, show=self.show)

    @property
    def counts(self) -> bool:
        """Whether the program is to report its steps."""
        return self.step is not None or (self.show and sys.stderr.isatty())

    @contextlib.contextmanager
    def denoising(self, steps: int) -> Iterator[Watcher | None]:
        """What is to be called at each of the steps, if anything."""
        if not self.show or not self.counts:
            with self.doing(f"denoising, {steps} steps"):
                yield self.step
            return
        with task("denoising", steps) as count:
            yield count


SILENT = Progress()
