"""Several processes are one run: before the first step they compare what they were told and what they see.

Options that differ would have each process train at its own rate, or wait for ever for a batch of another size.
"""

from __future__ import annotations

import json
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from dynaip_jax.errors import UserError
from dynaip_jax.runtime.compiling import VARIABLE
from dynaip_jax.storage.codec import to_dict
from train.config import TrainConfig

# Options that are a process's own: who it is, where this host has what is known by its content, how it reads.
OWN = (
    "bundle", "data.path", "data.also", "data.features", "data.workers", "data.prefetch", "distributed.index", "distributed.coordinator", "init_adapter",
    "validation.path",
)  # fmt: skip
PATIENCE, BRIEFLY = 30.0, 3.0  # seconds until a file that one host wrote must be seen by the others


def check_config(config: TrainConfig, **more: Any) -> None:
    """Raises `UserError`, on all processes alike, if their configs differ, or what else they were told (`more`)."""
    facts = _flat(to_dict(config)) | more
    told = {f"`{name}`": value for name, value in facts.items() if name not in OWN}
    _check_same(told, "start all processes with the same options")


def check_identity(identity: Mapping[str, str]) -> None:
    """Raises `UserError`, on all processes alike, if they would train from other data or weights: `Run.identity`."""
    _check_same({f"its {name}": value for name, value in identity.items()}, "give all hosts the same data and bundle")


def _check_same(facts: dict[str, Any], remedy: str) -> None:
    hosts = [json.loads(text) for text in _from_all(json.dumps([socket.gethostname(), facts]))]
    first_host, first = hosts[0]
    for number, (host, other) in enumerate(hosts):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise UserError(
                    f"process {number} ({host}): {name} {_short(other.get(name))}; process 0 ({first_host}) has "
                    f"{_short(first.get(name))}; {remedy}"
                )


def check_shared(workdir: epath.Path) -> None:
    """Raises `UserError`, on all processes alike, if one of them does not see what process 0 writes in `workdir`."""
    if jax.process_count() > 1 and (blind := _blind(workdir, PATIENCE)):
        raise UserError(
            f"`workdir` {workdir}: {', '.join(blind[:4])} of {jax.process_count()} processes do not see what process 0 wrote there; expected one "
            "folder for all; choose one on a disk that all hosts share, or in a bucket"
        )


def agree_on_compiled() -> None:
    """Has all processes load compiled programs from JAX's cache, or none.

    Process 0 alone writes to it. Where the others do not find what it finds they would compile for themselves, and a program that was
    loaded need not exchange its data in the order of one that was compiled: on CPUs, whose programs have another key in each
    process, the run aborts.
    """
    options: Any = jax.config  # its attributes are made as JAX runs
    folder = options.jax_compilation_cache_dir
    if jax.process_count() == 1 or not folder or not options.jax_enable_compilation_cache:
        return
    jax.config.update("jax_enable_compilation_cache", False)
    if jax.default_backend() == "cpu":
        return
    if _blind(epath.Path(folder), BRIEFLY):
        if jax.process_index() == 0:
            print(
                f"compiled programs are not kept: not all processes see {folder}; set {VARIABLE} to a folder that they share, or in a bucket",
                file=sys.stderr,
            )
        return
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()  # whether it is used has been asked already


def _blind(folder: epath.Path, patience: float) -> list[str]:
    """The processes that do not see, within `patience` seconds, a file that process 0 writes in `folder`."""
    (mark, *_), here = _from_all(secrets.token_hex(8)), jax.process_index() == 0
    file = folder / f".seen-{mark}"
    if here:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    _from_all("written")
    until = time.monotonic() + patience
    while not (seen := file.exists()) and time.monotonic() < until:
        time.sleep(0.1)
    hosts = [json.loads(text) for text in _from_all(json.dumps([socket.gethostname(), seen]))]
    if here:
        file.unlink(missing_ok=True)
    return [f"process {number} ({host})" for number, (host, saw) in enumerate(hosts) if not saw]


def _from_all(text: str) -> list[str]:
    """What each process says, in their order."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    said = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(said)))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(said)] = said
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _short(value: Any) -> str:
    return repr(value)[:60]
