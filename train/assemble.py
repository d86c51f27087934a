"""A run made ready: all that can be wrong is found before its folder is touched."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax
from etils import epath

from dynaip_jax.errors import UserError
from train.agreement import check_config, check_identity, check_shared
from train.config import TrainConfig, moved
from train.evaluators import Due
from train.metrics import say
from train.run import Run
from train.workdir import (
    check_free,
    check_step,
    check_workdir,
    claim_workdir,
    go_back,
    holds_run,
    only_trainer,
    read_config,
)


@contextlib.contextmanager
def assembled(
    config: TrainConfig,
    workdir: epath.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    resume_from: int | None = None,
) -> Iterator[Run]:
    """A run with its parts open and its folder claimed; closed at the end of the block. `resume_from`: see `train`.

    Raises `UserError` for a config, base, data or folder that do not go together, before the folder is touched.
    """
    check_imports(workdir)
    run = Run(config, workdir)
    with contextlib.ExitStack() as claimed, contextlib.closing(run):
        check_config(config, resume=resume, overwrite=overwrite, resume_from=resume_from, workdir=run.workdir.name)
        run.check_batch()
        check_free(run.workdir)
        check_workdir(run.workdir, config, run.identity, resume=resume, overwrite=overwrite)
        if resume_from is not None:
            check_step(run.workdir, resume_from)
        for line in moved(read_config(run.workdir), config) if resume and holds_run(run.workdir) else ():
            say(f"{line} (its content is the same)")
        for part in ("constants", "frozen", "data", *(() if resume else ("first_adapter",))):
            getattr(run, part)
        run.evaluators = shipped(run)
        check_identity(run.identity)
        if jax.process_index() == 0:
            claimed.enter_context(only_trainer(run.workdir))
            check_workdir(run.workdir, config, run.identity, resume=resume, overwrite=overwrite)
            claim_workdir(run.workdir, config, run.identity, overwrite=overwrite)
            if resume_from is not None:
                go_back(run.workdir, resume_from)
        check_shared(run.workdir)
        yield run


def check_imports(workdir: epath.PathLike) -> None:
    """Raises `UserError` if a package is missing that is imported late."""
    try:
        import tensorboard.compat.proto.event_pb2  # noqa: F401
        import tensorflow_datasets  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"training needs {(e.name or str(e)).partition('.')[0]}, which is not installed; pip install -e . in the checkout"
        ) from e
    if os.fspath(workdir).startswith("gs://"):
        try:
            from google.cloud import storage  # noqa: F401  (Orbax asks it whether the bucket has folders)
        except ImportError as e:
            raise UserError(
                f"`workdir` {workdir}: checkpoints in a bucket need google-cloud-storage, which is not installed; pip install "
                "google-cloud-storage"
            ) from e


def shipped(run: Run) -> list[Due]:
    """The evaluators that the config of `run` asks for. Raises `UserError` for what they cannot work with."""
    due, config = [], run.config
    if config.sample.every:
        from train.samples import Sampler

        due.append(Due(config.sample.every, Sampler(run)))
    if config.validation.every:
        from train.validation import Validation

        due.append(Due(config.validation.every, Validation(run)))
    return due
