"""What a long command is doing: a bar on a terminal, elsewhere (a log) a line every so often."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

EVERY = 30.0  # seconds between lines where there is no terminal, and before the first

Step = Callable[..., object]  # called with the number of units that are done, 1 if left out


@contextlib.contextmanager
def task(text: str, total: int | None = None, unit: str = "step", show: bool = True) -> Iterator[Step]:
    """Shows on stderr that the block does `text`; its value is to be called after each of `total` units, if it counts some. Nothing
    is shown unless `show`, and no line for what takes less than `EVERY` seconds."""
    if not show:
        yield lambda n=1: None
    elif sys.stderr.isatty():
        with _bar(text, total, unit) as step:
            yield step
    else:
        with _lines(text, total, unit) as step:
            yield step


@contextlib.contextmanager
def _bar(text: str, total: int | None, unit: str) -> Iterator[Step]:
    from tqdm import tqdm

    usual = "{desc} [{elapsed}]" if total is None else None
    with tqdm(total=total, desc=text, unit=unit, bar_format=usual, leave=total is not None) as bar:
        with _every(1.0, bar.refresh) if total is None else contextlib.nullcontext():
            yield bar.update


@contextlib.contextmanager
def _lines(text: str, total: int | None, unit: str) -> Iterator[Step]:
    began, done = time.monotonic(), 0

    def count(n: int = 1) -> None:
        nonlocal done
        done += n

    def say() -> None:
        print(line(text, time.monotonic() - began, done, total, unit), file=sys.stderr, flush=True)

    with _every(EVERY, say):
        yield count


@contextlib.contextmanager
def _every(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Calls `action` in another thread every so many seconds of the block: this one may be in compiled code."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(seconds):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def line(text: str, seconds: float, done: int, total: int | None, unit: str) -> str:
    """Such as "denoising: 5 of 28 steps, 1:20, 6:08 left"."""
    if total is None:
        return f"{text}: {_clock(seconds)}"
    left = f", {_clock(seconds / done * (total - done))} left" if done else ""
    plural = "" if total == 1 or unit.endswith("iB") else "es" if unit.endswith("ch") else "s"
    return f"{text}: {done} of {total} {unit}{plural}, {_clock(seconds)}{left}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
