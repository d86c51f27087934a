"""Progress of compiled loops: the program reports each step, and whoever started it is told."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import jax

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


@contextlib.contextmanager
def bar(steps: int, show: bool) -> Iterator[Watcher | None]:
    """A watcher that shows a bar over `steps` on the terminal; None unless `show`."""
    if not show:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=steps, desc="denoising", unit="step") as shown:
        yield shown.update
