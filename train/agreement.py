"""Several processes are one run: before the first step they compare what they were told and what they see.

Options that differ would have each process train at its own rate, or wait for ever for a batch of another size.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from dynaip_jax.errors import UserError
from dynaip_jax.storage.codec import to_dict
from train.config import TrainConfig

# Options that are a process's own: who it is, where this host has what is known by its content, how it reads.
OWN = (
    "bundle", "data.path", "data.also", "data.features", "data.workers", "data.prefetch", "distributed.index", "distributed.coordinator", "init_adapter",
    "validation.path",
)  # fmt: skip
PATIENCE = 30.0  # seconds until a file that one host wrote must be seen by the others


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


@contextlib.contextmanager
def shared(workdir: epath.Path) -> Iterator[None]:
    """A block in which process 0 makes `workdir`. Raises `UserError`, on all processes alike, if another does not see it afterwards."""
    if jax.process_count() == 1:
        yield
        return
    (mark, *_), here = _from_all(secrets.token_hex(8)), jax.process_index() == 0
    file = workdir / f".seen-{mark}"
    yield
    if here:
        file.write_bytes(b"")
    _from_all("written")
    until = time.monotonic() + PATIENCE
    while not (seen := file.exists()) and time.monotonic() < until:
        time.sleep(0.1)
    hosts = _from_all(json.dumps([socket.gethostname(), seen]))
    if here:
        file.unlink(missing_ok=True)
    for number, text in enumerate(hosts):
        host, saw = json.loads(text)
        if not saw:
            raise UserError(
                f"`workdir` {workdir}: process {number} ({host}) does not see what process 0 ({json.loads(hosts[0])[0]}) wrote there; "
                "expected one folder for all; choose one on a disk that all hosts share, or in a bucket"
            )


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
