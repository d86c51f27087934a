"""Batches ahead of time: grain runs the reader in worker processes or threads; the iterator's state is the step."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from dynaip_jax.data.asking import Alone, Answers, Asked
from dynaip_jax.data.cached import Cached
from dynaip_jax.data.children import follow_parent
from dynaip_jax.data.config import DataConfig
from dynaip_jax.data.mixture import open_data
from dynaip_jax.data.order import Steps, make_order
from dynaip_jax.data.records import Dataset
from dynaip_jax.data.samples import Pictures, Reader, TextIds
from dynaip_jax.errors import UserError


def make_loader(
    config: DataConfig,
    tokenizers: TextIds,
    *,
    global_batch: int,
    positions: Int[np.ndarray, " b"] | None = None,
    encoders: str = "",
) -> BatchIterator:
    """An endless iterator of this process's `Batch` of each global batch, from step 0; its state is the step. With
    `config.features` it gives `CachedBatch`es, if they were made by the `encoders` of this identity.

    `positions` int `[b]`: which samples of each global batch this process reads; None = all.
    Raises `UserError` for a dataset that cannot be opened, one smaller than `global_batch`, and rows without mask if the
    background is to be removed.
    """
    if not config.path:
        raise UserError(
            "`data.path`: not given; expected a folder written by python -m train.prepare; pass `data.path` DIR"
        )
    dataset = open_data(config)
    if config.remove_background and not dataset.masked.all():
        rows = dataset.numbers[~dataset.masked]
        raise UserError(
            f"`data.remove_background`: {len(rows)} of {len(dataset)} rows of {dataset.path} have no mask (row {rows[0]} is "
            "the first); expected a mask in every row; add them and prepare again, or leave the option out"
        )
    order = make_order(config, dataset, global_batch)
    reader: Reader = Pictures(dataset, config, tokenizers)
    if config.features:
        reader = Cached.open(config, dataset, order, encoders)
    return BatchIterator(
        order,
        reader,
        positions=np.arange(global_batch) if positions is None else positions,
        workers=config.workers,
        prefetch=config.prefetch,
        identity=_identity(dataset, reader),
    )


def _identity(dataset: Dataset, reader: Reader) -> dict[str, Any]:
    """What batches are made of besides their order."""
    identity: dict[str, Any] = dict(content=dataset.content) if dataset.content else {}
    return identity | (dict(variants=reader.variants) if isinstance(reader, Cached) else {})


class _Steps:
    """Random access to the batches of one process, counted from training step `start`. `asked` knows the rows of each."""

    def __init__(self, asked: Asked | Alone, reader: Reader, start: int):
        self.asked, self.reader, self.start = asked, reader, start

    def __len__(self) -> int:
        return sys.maxsize - self.start

    def __getitem__(self, n: int) -> Any:
        step = self.asked.step(self.start + int(n))
        return self.reader.read(step.rows, step.bucket, step.epoch)


class BatchIterator(grain.DatasetIterator):
    """Endless batches for one process: the samples at `positions` of every global batch in `order`, made by `reader`.

    The state is the number of the next step, whatever the number of processes, workers or batches ready ahead: all of
    them may change between saving and restoring. `identity`: what the batches are made of, kept in the state. Works with `grain.checkpoint.CheckpointSave` / `CheckpointRestore`.
    Close it to end its workers. `next` raises `UserError` if one of them was killed, `set_state` if the data are not
    those of the state.
    """

    def __init__(
        self,
        order: Steps,
        reader: Reader,
        *,
        positions: np.ndarray,
        workers: int,
        prefetch: int,
        identity: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self._inner: list[Any] = []  # what answers its workers, and grain's iterator, if it runs
        weakref.finalize(self, _end, self._inner)  # at exit, while there still is an interpreter
        self.order, self.reader, self._positions = order, reader, positions
        self._identity = dict(identity or {})
        self._workers, self._prefetch = workers, prefetch
        self._step = 0

    def __next__(self) -> Any:
        self._assert_not_closed()
        self.start_prefetch()
        try:
            batch = next(self._inner[-1])
        except RuntimeError as e:
            if "terminated unexpectedly" not in str(e):
                raise
            reason = str(e).split(".")[0]
            raise UserError(
                f"`data.workers` {self._workers}: {reason}; expected it to have enough memory, also in /dev/shm; "
                "give more (docker: --shm-size), make batches smaller, or pass `data.workers` 0"
            ) from e
        self._step += 1
        # out of the memory shared with the worker, which is scarce and may not outlive the interpreter
        return _copied(batch) if self._workers else batch

    def start_prefetch(self) -> None:
        """Starts the workers, so that the first batch is made while the caller does other things."""
        if not self._inner:
            if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, and refuse to before absl has parsed any
                flags.FLAGS.mark_as_parsed()
            asked: Asked | Alone = Alone(self.order, self._positions)
            if self._workers:
                answers = Answers(self.order, self._positions)
                self._inner.append(answers)
                asked = answers.asked
            steps: Any = _Steps(asked, self.reader, self._step)
            threads = 0 if self._workers else self._prefetch
            batches = grain.MapDataset.source(steps).to_iter_dataset(
                grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
            )
            options = grain.MultiprocessingOptions(self._workers, self._prefetch)
            self._inner.append(iter(batches.mp_prefetch(options, _start_worker)))
            self._inner[-1].start_prefetch()

    def get_state(self) -> dict[str, Any]:
        """The next step, a fingerprint of the buckets, batch size and seed that give it its meaning, and the data's `identity`."""
        return {"step": self._step, "plan": self.order.fingerprint, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on at the step of `state`. Raises `UserError` if it belongs to another order or to other data."""
        if state.get("plan") != self.order.fingerprint:
            raise UserError(
                "data: the checkpoint was made with other rows, resolution, aspects, batch size or data.seed; expected the "
                "same; restore them, or start a new run"
            )
        for name, value in self._identity.items():
            if state.get(name, value) != value:  # older states do not say
                raise UserError(
                    f"data: the checkpoint was made with other pictures or captions ({name} {str(state[name])[:12]}, this run has "
                    f"{str(value)[:12]}); expected the same; restore them, or start a new run"
                )
        _end(self._inner)
        self._step = int(state["step"])

    def close(self) -> None:
        """Ends the workers; the iterator cannot be used any more."""
        super().close()
        _end(self._inner)


def _end(iterators: list[Any]) -> None:
    while iterators:
        iterators.pop().close()


def _copied(part: Any) -> Any:
    """The same tuple, named tuple or dict of fresh arrays; None stays None."""
    if isinstance(part, dict):
        return {name: _copied(x) for name, x in part.items()}
    if not isinstance(part, tuple):
        return None if part is None else np.array(part)
    parts = map(_copied, part)
    return type(part)._make(parts) if hasattr(part, "_make") else tuple(parts)


def _start_worker(index: int, count: int) -> None:
    follow_parent()
