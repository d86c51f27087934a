"""The folder of a run, on a disk or in a bucket (gs://): whether a run may start in it, and what is written there first."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from etils import epath

from dynaip_jax.errors import UserError
from dynaip_jax.storage.codec import from_dict, to_dict
from dynaip_jax.storage.folders import is_bucket
from train.config import TrainConfig, differing

RUN_FILE = "run.json"
FULL_DISK = (
    "No space left",
    "RESOURCE_EXHAUSTED: Error writing",
    "Disk quota",
    "File too large",
)  # in other libraries' errors


def check_workdir(
    workdir: epath.PathLike, config: TrainConfig, fingerprint: str, *, resume: bool, overwrite: bool
) -> None:
    """Whether a run may start in `workdir`; changes nothing.

    Raises `UserError` if the folder holds a run and neither `resume` nor `overwrite` is said, if it holds something else,
    and if config or base differ from those of the run to be resumed.
    """
    workdir = epath.Path(workdir)
    run = workdir / RUN_FILE
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"`workdir` {workdir}: is a file; expected a folder; choose another name")
    if not run.is_file():
        if workdir.is_dir() and {x.name for x in workdir.iterdir()} - {_partial(run).name}:
            raise UserError(f"`workdir` {workdir}: holds files that are not a run's; choose an empty or new folder")
    elif resume:
        _check_same(workdir, config, fingerprint)
    elif not overwrite:
        raise UserError(f"`workdir` {workdir}: holds a run; pass `resume` to go on with it or `overwrite` to delete it")


def _check_same(workdir: epath.Path, config: TrainConfig, fingerprint: str) -> None:
    run = workdir / RUN_FILE
    try:
        saved = json.loads(run.read_text())
        differences, base = differing(from_dict(TrainConfig, saved["config"]), config), saved["base"]
    except (OSError, ValueError, KeyError, TypeError, UserError) as e:
        raise UserError(f"{run}: not readable ({e}); expected the run's config; start again with `overwrite`") from e
    if base != fingerprint:
        raise UserError(
            f"`resume` {workdir}: trained on another base (fingerprint {base[:12]}, this one has {fingerprint[:12]}); "
            "pass the `bundle` of that run"
        )
    if differences:
        raise UserError(
            f"`resume` {workdir}: config differs: {'; '.join(differences)}; use the run's own, or a new `workdir`"
        )


def claim_workdir(workdir: epath.PathLike, config: TrainConfig, fingerprint: str, *, overwrite: bool) -> None:
    """Makes a checked `workdir` ready: deletes the run in it if `overwrite`, and writes `run.json` (config, base fingerprint).

    `run.json` is there throughout, so that a kill in between leaves a run, whole or with nothing done yet.
    """
    workdir = epath.Path(workdir)
    run = workdir / RUN_FILE
    with disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        for path in workdir.iterdir():
            if overwrite and path != run:
                path.rmtree() if path.is_dir() else path.unlink()
        text = json.dumps(dict(base=fingerprint, config=to_dict(config)), indent=2)
        write_whole(run, (text + "\n").encode())


def read_config(workdir: epath.PathLike) -> TrainConfig:
    """The config of the run in `workdir`. Raises `UserError` if there is none."""
    try:
        return from_dict(TrainConfig, json.loads((epath.Path(workdir) / RUN_FILE).read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError, UserError) as e:
        raise UserError(
            f"`workdir` {workdir}: no readable {RUN_FILE} ({e}); expected a run's folder; check the path"
        ) from e


@contextlib.contextmanager
def disk_errors(workdir: epath.PathLike) -> Iterator[None]:
    """A full or unwritable disk becomes a `UserError` that names `workdir`; earlier checkpoints stay whole."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"`workdir` {workdir}: cannot be written ({e.strerror or e}); the last whole checkpoint is kept; free space or "
            "choose another disk, then `resume`"
        ) from e
    except Exception as e:  # Orbax and tensorstore wrap the operating system's words in errors of their own
        if any(words in str(e) for words in FULL_DISK):
            raise UserError(
                f"`workdir` {workdir}: the disk is full; the last whole checkpoint is kept; free space, then `resume`"
            ) from e
        raise


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all: under another name first, but in a bucket, where all writes are so."""
    if is_bucket(path):
        path.write_bytes(content)
    else:
        _partial(path).write_bytes(content)
        _partial(path).replace(path)


def _partial(path: epath.Path) -> epath.Path:
    return path.with_suffix(".partial")
