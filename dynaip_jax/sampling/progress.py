"""Progress of a generation: what it is doing, and each step, which the compiled program itself reports."""

from __future__ import annotations

import contextlib
import itertools
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
    """What is told of a generation: with `show`, its phases and a count of steps on stderr; `step` is called at each step."""

    show: bool = False
    step: Watcher | None = None

    @classmethod
    def of(cls, asked: bool | Watcher) -> Progress:
        """`asked`: whether to show it, or what to call at each step."""
        return cls(step=asked) if callable(asked) else cls(show=bool(asked))

    def doing(self, text: str) -> contextlib.AbstractContextManager[object]:
        """The block is a phase of its own."""
        return task(text, show=self.show)

    @contextlib.contextmanager
    def denoising(self, steps: int) -> Iterator[Watcher | None]:
        """What is to be called at each of the steps, if anything."""
        if not self.show:
            yield self.step
            return
        with task("denoising", steps) as count:
            yield count


SILENT = Progress()
