"""A trace of a few steps, for TensorBoard's profile page or xprof."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from train.config import ProfileConfig
from train.workdir import write_whole


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
            for file in sorted(path for path in Path(name).rglob("*") if path.is_file()):
                target = self._folder / file.relative_to(name).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                write_whole(target, file.read_bytes())
        self._disk = None
