"""How a run ends early, and how its processes wait for each other."""

from __future__ import annotations

import signal

import jax


class Stop:
    """Notes SIGTERM (preemption) and, in a single process, SIGINT while the block runs, instead of ending at once.

    With several processes JAX notes SIGTERM (to any of them), and finds a step that all can reach without waiting for each other
    at every one.
    """

    def __init__(self) -> None:
        self.asked = ""

    def __enter__(self) -> Stop:
        noted = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._before = {s: signal.signal(s, self._note) for s in noted}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.asked = signal.Signals(number).name

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`; all processes get the same answer."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.asked = signal.SIGTERM.name
        return bool(self.asked)


def barrier(name: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
