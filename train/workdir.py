"""The folder of a run, on a disk or in a bucket (gs://): whether a run may start in it, and what is written there first."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from etils import epath

from dynaip_jax.errors import UserError, reason
from dynaip_jax.reading import parse_json
from dynaip_jax.storage.codec import from_dict, to_dict
from dynaip_jax.storage.folders import copy_tree, is_bucket
from dynaip_jax.storage.locks import hold, hold_in_bucket, holder_of
from dynaip_jax.storage.renames import partials, write_new
from train.checksums import COMMITTED
from train.config import TrainConfig, differing

RUN_FILE, LOCK = "run.json", "trainer.lock"
CHECKPOINTS, SET_ASIDE, DISCARDED = "checkpoints", "set_aside", "discarded"
FULL_DISK = (
    "No space left",
    "RESOURCE_EXHAUSTED: Error writing",
    "Disk quota",
    "File too large",
)  # in other libraries' errors


def check_workdir(
    workdir: epath.PathLike, config: TrainConfig, identity: Mapping[str, str], *, resume: bool, overwrite: bool
) -> None:
    """Whether a run may start in `workdir`; changes nothing. `identity`: what it is made of, by content (`Run.identity`).

    Raises `UserError` if the folder holds a run and neither `resume` nor `overwrite` is said, if it holds something else,
    and if config, base, encoders or data differ from those of the run to be resumed.
    """
    workdir = epath.Path(workdir)
    run = workdir / RUN_FILE
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"`workdir` {workdir}: is a file; expected a folder; choose another name")
    if not run.is_file():
        if workdir.is_dir() and not all(x.name == LOCK or _is_partial(x.name) for x in workdir.iterdir()):
            raise UserError(f"`workdir` {workdir}: holds files that are not a run's; choose an empty or new folder")
    elif resume:
        _check_same(workdir, config, identity)
    elif not overwrite:
        raise UserError(f"`workdir` {workdir}: holds a run; pass `resume` to go on with it or `overwrite` to delete it")


def _check_same(workdir: epath.Path, config: TrainConfig, identity: Mapping[str, str]) -> None:
    run = workdir / RUN_FILE
    try:
        saved = parse_json(run.read_bytes())
        differences, base = differing(from_dict(TrainConfig, saved["config"]), config), saved["base"]
    except (OSError, ValueError, KeyError, TypeError, UserError) as e:
        raise UserError(
            f"{run}: not readable ({reason(e)}); expected the run's config; start again with `overwrite`"
        ) from e
    if base != identity["base"]:
        raise UserError(
            f"`resume` {workdir}: trained on another base (fingerprint {base[:12]}, this one has {identity['base'][:12]}); "
            "pass the `bundle` of that run"
        )
    if differences:
        raise UserError(
            f"`resume` {workdir}: config differs: {'; '.join(differences)}; use the run's own, or a new `workdir`"
        )
    for part, option in (("encoders", "bundle"), ("data", "data.path")):
        old, new = saved.get(part), identity.get(part)
        if old and new and old != new:  # older runs, and datasets without a digest, do not say
            raise UserError(
                f"`resume` {workdir}: trained with other {part} ({old[:12]}, this `{option}` has {new[:12]}); pass those of that run, or "
                "a new `workdir`"
            )


def check_free(workdir: epath.PathLike) -> None:
    """Raises `UserError` if a trainer runs in `workdir`; changes nothing."""
    if not is_bucket(workdir) and (holder := holder_of(_local(workdir) / LOCK)):
        raise _busy(workdir, holder)


@contextlib.contextmanager
def only_trainer(workdir: epath.PathLike) -> Iterator[None]:
    """Makes `workdir`, and keeps other trainers out of it while the block runs. Raises `UserError` that names the one in it."""
    with contextlib.ExitStack() as held:
        with disk_errors(workdir):
            epath.Path(workdir).mkdir(parents=True, exist_ok=True)
            busy = functools.partial(_busy, workdir)
            if is_bucket(workdir):
                held.enter_context(hold_in_bucket(epath.Path(workdir) / LOCK, busy))
            else:
                held.enter_context(hold(_local(workdir) / LOCK, busy))
        yield


def _busy(workdir: epath.PathLike, holder: str) -> UserError:
    return UserError(
        f"`workdir` {workdir}: {holder} trains in it; wait until that has ended, stop it, or choose another folder"
    )


def claim_workdir(
    workdir: epath.PathLike, config: TrainConfig, identity: Mapping[str, str], *, overwrite: bool
) -> None:
    """Makes a checked `workdir` ready: deletes the run in it if `overwrite`, and writes `run.json` (`identity`, config).

    `run.json` is there throughout, so that a kill in between leaves a run, whole or with nothing done yet.
    """
    workdir = epath.Path(workdir)
    run = workdir / RUN_FILE
    with disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        if overwrite:
            _discard_checkpoints(workdir)
        for path in workdir.iterdir():
            if path.name == DISCARDED or (overwrite and path.name not in (RUN_FILE, LOCK)):
                path.rmtree() if path.is_dir() and not os.path.islink(path) else path.unlink()
        if not is_bucket(workdir):
            for folder in (workdir, workdir / "samples", workdir / "tensorboard"):
                for path in [*partials(_local(folder)), *_local(folder).glob(".seen-*")]:
                    path.unlink()
        text = json.dumps(dict(identity) | dict(config=to_dict(config)), indent=2)
        write_whole(run, (text + "\n").encode())


def _discard_checkpoints(workdir: epath.Path) -> None:
    """Has the checkpoints of a run be none any more before they are deleted, so that a kill leaves none that looks complete."""
    if is_bucket(workdir):
        for step in steps_in(workdir):
            (workdir / CHECKPOINTS / str(step) / COMMITTED).unlink()
    elif (workdir / CHECKPOINTS).is_dir() and not (workdir / DISCARDED).exists():
        (workdir / CHECKPOINTS).rename(workdir / DISCARDED)


def remove_checkpoint(folder: epath.Path) -> None:
    """Deletes a checkpoint in a bucket, which stops being one first."""
    (folder / COMMITTED).unlink(missing_ok=True)
    folder.rmtree(missing_ok=True)


def holds_run(workdir: epath.PathLike) -> bool:
    """Whether there is a run in `workdir`."""
    return (epath.Path(workdir) / RUN_FILE).is_file()


def read_identity(workdir: epath.PathLike) -> dict[str, str]:
    """What the run in `workdir` is made of, as `claim_workdir` wrote it; runs of older versions say less. Errors as in `read_config`."""
    read_config(workdir)
    saved = parse_json((epath.Path(workdir) / RUN_FILE).read_bytes())
    return {name: saved[name] for name in ("base", "encoders", "data") if saved.get(name)}


def steps_in(workdir: epath.PathLike) -> list[int]:
    """Steps of the whole checkpoints in a run's folder, in order. On a disk they get their names when they are whole; in a bucket a
    file ends each."""
    folder = epath.Path(workdir) / CHECKPOINTS
    paths = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted(int(path.name) for path in paths if not is_bucket(path) or (path / COMMITTED).is_file())


def check_step(workdir: epath.PathLike, step: int) -> None:
    """Raises `UserError` if the run in `workdir` has no checkpoint of `step`."""
    steps = steps_in(workdir)
    if step not in steps:
        raise UserError(
            f"`resume_from` {step}: no such checkpoint in {workdir}; it has {', '.join(map(str, steps)) or 'none'}; choose one of them"
        )


def go_back(workdir: epath.PathLike, step: int) -> None:
    """Moves the checkpoints after `step` into `WORKDIR/SET_ASIDE`, with a copy of the metrics, so that the run goes on from `step`."""
    workdir = epath.Path(workdir)
    later = [other for other in steps_in(workdir) if other > step]
    if not later:
        return
    with disk_errors(workdir):
        aside = next(place for n in itertools.count(1) if not (place := workdir / SET_ASIDE / str(n)).exists())
        aside.mkdir(parents=True)
        for metrics in workdir.glob("metrics.jsonl"):
            metrics.copy(aside / metrics.name)
        for other in later:
            source, target = workdir / CHECKPOINTS / str(other), aside / str(other)
            if is_bucket(workdir):
                copy_tree(source, target, last=(COMMITTED,))
                remove_checkpoint(source)
            else:
                source.rename(target)
    print(f"checkpoints after step {step} ({', '.join(map(str, later))}) are set aside in {aside}", file=sys.stderr)


def read_config(workdir: epath.PathLike) -> TrainConfig:
    """The config of the run in `workdir`. Raises `UserError` if there is none."""
    try:
        return from_dict(TrainConfig, parse_json((epath.Path(workdir) / RUN_FILE).read_bytes())["config"])
    except (OSError, ValueError, KeyError, TypeError, UserError) as e:
        raise UserError(
            f"`workdir` {workdir}: no readable {RUN_FILE} ({reason(e)}); expected a run's folder; check the path"
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
    """Writes a file that appears whole or not at all, on a disk or in a bucket, where all writes are so."""
    if is_bucket(path):
        path.write_bytes(content)
    else:
        write_new(_local(path), content)


def _is_partial(name: str) -> bool:
    return name.startswith(f".{RUN_FILE}.") and name.endswith(".partial")


def _local(path: epath.PathLike) -> Path:
    return Path(os.fspath(path))
