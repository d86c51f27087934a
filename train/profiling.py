"""A trace of a few steps, for TensorBoard's profile page or xprof."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from dynaip_jax.storage.folders import copy_tree
from train.config import ProfileConfig


class Profile:
    """Traces steps `config.start` to `config.start + config.steps - 1`, counted from 1, while the block runs; writes the trace to
    `folder`, also if the run ends within them. Traced on a disk first: JAX cannot write into a bucket."""

    def __init__(self, config: ProfileConfig, folder: epath.Path):
        self._config, self._folder = config, folder
        self._disk: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *error: object) -> None:
        self._write()

    def after(self, step: int, values: Any) -> None:
        """To be called once a step is started, and before the first; `values`: arrays that the step makes, waited for where a trace
        begins or ends."""
        if self._config.steps and step == self._config.start - 1:
            jax.block_until_ready(values)
            self._disk = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._disk.name)
        if self._disk is not None and step == self._config.start + self._config.steps - 1:
            jax.block_until_ready(values)
            self._write()

    def _write(self) -> None:
        if self._disk is None:
            return
        jax.profiler.stop_trace()
        with self._disk as name:
            copy_tree(Path(name), self._folder)
        self._disk = None
