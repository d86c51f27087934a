"""Batches ahead of time: grain runs the reader in worker processes or threads; the iterator's state is the step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from typing import Any

import grain
from absl import flags

from dynaip_jax.data.plan import Plan
from dynaip_jax.data.sources import Reader
from dynaip_jax.errors import UserError


class _Steps:
    """Random access to the batches of one process, counted from training step `start`."""

    def __init__(self, plan: Plan, reader: Reader, part: slice, start: int):
        self.plan, self.reader, self.part, self.start = plan, reader, part, start

    def __len__(self) -> int:
        return sys.maxsize - self.start

    def __getitem__(self, n: int) -> Any:
        step = self.plan.step(self.start + int(n))
        return self.reader.read(step.rows[self.part], step.bucket, step.epoch)


class BatchIterator(grain.DatasetIterator):
    """Endless batches for one process: its slice of every global batch of `plan`, made by `reader`.

    The state is the number of the next step, whatever the number of processes, workers or batches ready ahead: all of
    them may change between saving and restoring. Works with `grain.checkpoint.CheckpointSave` / `CheckpointRestore`.
    Close it to end its workers. Raises `UserError` if `process_count` does not divide the global batch, and
    `set_state` raises it if the data are not those of the state.
    """

    def __init__(
        self, plan: Plan, reader: Reader, *, process_index: int, process_count: int, workers: int, prefetch: int
    ):
        super().__init__()
        self._inner: Any = None
        local, rest = divmod(plan.global_batch, process_count)
        if rest:
            raise UserError(
                f"batch size {plan.global_batch}: not divisible by {process_count} processes; "
                f"expected a multiple; use {local * process_count or process_count}"
            )
        self.plan, self.reader = plan, reader
        self._part = slice(process_index * local, (process_index + 1) * local)
        self._workers, self._prefetch = workers, prefetch
        self._step = 0

    def __next__(self) -> Any:
        self._assert_not_closed()
        self.start_prefetch()
        batch = next(self._inner)
        self._step += 1
        return batch

    def start_prefetch(self) -> None:
        """Starts the workers, so that the first batch is made while the caller does other things."""
        if self._inner is None:
            if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, and refuse to before absl has parsed any
                flags.FLAGS.mark_as_parsed()
            steps: Any = _Steps(self.plan, self.reader, self._part, self._step)
            threads = 0 if self._workers else self._prefetch
            batches = grain.MapDataset.source(steps).to_iter_dataset(
                grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
            )
            options = grain.MultiprocessingOptions(self._workers, self._prefetch)
            self._inner = iter(batches.mp_prefetch(options, _start_worker))
            self._inner.start_prefetch()

    def get_state(self) -> dict[str, Any]:
        """The next step, and a fingerprint of the rows, buckets, batch size and seed that give it its meaning."""
        return {"step": self._step, "plan": self.plan.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on at the step of `state`. Raises `UserError` if it belongs to another plan."""
        if state.get("plan") != self.plan.fingerprint:
            raise UserError(
                "data: the checkpoint was made with other rows, resolution, aspects, batch size or data.seed; expected the "
                "same; restore them, or start a new run"
            )
        self._stop()
        self._step = int(state["step"])

    def close(self) -> None:
        """Ends the workers; the iterator cannot be used any more."""
        super().close()
        self._stop()

    def _stop(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None


def _start_worker(index: int, count: int) -> None:
    """Workers live exactly as long as the trainer: they leave signals sent to the whole group to it (it still needs
    batches while it saves), and end when it ends, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
