"""Weights written piece by piece: of a component no more is in memory than a few pieces, and after a kill the next writer goes on.

The result is an Orbax checkpoint whose arrays are Zarr chunks, not compressed, each in a file of its own: what `Bundle.load` reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynaip_jax.storage.arena import reused
from dynaip_jax.storage.manifest import BFLOAT16, entry_digests, raw

AT_ONCE = max(2, min(8, os.cpu_count() or 2))  # pieces
ROOM = 1 << 28  # bytes of pieces that may wait; a larger piece is alone
CHUNK = 1 << 22  # bytes


class NewLeaf(NamedTuple):
    """An array to be written. `reads`: give its value if `stacked` is False and they are one, else its rows along axis 0 in order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    reads: tuple[Callable[[], np.ndarray], ...]
    stacked: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def value(self) -> np.ndarray:
        """All of it."""
        if not self.stacked:
            return self.reads[0]()
        whole = np.empty(self.shape, self.dtype)
        for row, read in zip(whole, self.reads, strict=True):
            row[...] = read()
        return whole

    def chunk(self, number: int) -> str:
        """The file of a piece in the leaf's folder."""
        rest = ["0"] * (len(self.shape) - self.stacked)
        return ".".join([str(number), *rest] if self.stacked else rest or ["0"])


class Written(NamedTuple):
    """sha256 of the values, as `manifest.fingerprint` has it, and by file."""

    fingerprint: str
    checksums: dict[str, str]


class Journal:
    """The sha256 of every file that is whole in a folder that is being made; it outlives the process, and goes with `close`."""

    def __init__(self, folder: Path):
        self._path, self._lock = folder / ".journal", threading.Lock()
        self.partial = folder / ".partial"
        self.partial.mkdir(exist_ok=True)
        lines = self._path.read_text(errors="replace").split("\n")[:-1] if self._path.is_file() else []
        pairs = (line.split(" ", 1) for line in lines)
        self._known = {pair[1]: pair[0] for pair in pairs if len(pair) == 2 and len(pair[0]) == 64}

    def known(self, name: str) -> str | None:
        """The sha256 that was noted for `name`."""
        return self._known.get(name)

    def note(self, name: str, sha256: str) -> None:
        """Notes one; a kill in the middle of it leaves a line that is not taken."""
        with self._lock, open(self._path, "a") as file:
            file.write(f"{sha256} {name}\n")

    def write(self, path: Path, name: str, content: Any) -> str:
        """Writes `content` (bytes-like) to `path`, which is whole or not there; its sha256."""
        part, whole, digest = self.partial / secrets.token_hex(8), memoryview(content).cast("B"), hashlib.sha256()
        with open(part, "xb", buffering=0) as file:
            for start in range(0, len(whole), CHUNK):
                left = whole[start : start + CHUNK]
                digest.update(left)
                while len(left):
                    left = left[file.write(left) :]
        os.replace(part, path)
        self.note(name, digest.hexdigest())
        return digest.hexdigest()

    def close(self) -> None:
        """Removes it, and what killed writers had half written."""
        for part in self.partial.iterdir():
            part.unlink()
        self.partial.rmdir()
        self._path.unlink(missing_ok=True)


def write_leaves(
    folder: Path, leaves: Mapping[str, NewLeaf], journal: Journal, step: Callable[[int], object]
) -> Written:
    """Writes `leaves` ("a.b.c" -> array) to `folder`; `step` is told of bytes that are done. Pieces that `journal` knows are
    compared with it and kept. Raises `OSError` for a full disk, and what reading a leaf raises."""
    sums: dict[str, str] = {}
    for name, leaf in leaves.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        sums[f"{name}/.zarray"] = journal.write(
            folder / name / ".zarray", f"{folder.name}/{name}/.zarray", _zarray(leaf)
        )

    def piece(name: str, number: int) -> tuple[str, str, bytes, int]:
        leaf = leaves[name]
        file = f"{name}/{leaf.chunk(number)}"
        with reused():
            digest = journal.known(f"{folder.name}/{file}")
            x = _kept(folder / file, leaf, digest)
            if digest is None or x is None:
                x = np.ascontiguousarray(leaf.reads[number](), leaf.dtype)
                digest = journal.write(folder / file, f"{folder.name}/{file}", raw(x))
            one = leaf.stacked and x.dtype == BFLOAT16  # whose bytes are those of the file
            return (
                file,
                digest,
                bytes.fromhex(digest) if one else entry_digests(x[None] if leaf.stacked else x),
                x.nbytes,
            )

    values, last = hashlib.sha256(), ""
    with contextlib.closing(pieces(leaves, piece)) as made:
        for name, (file, digest, entries, size) in made:
            sums[file] = digest
            if name != last:  # as `manifest.fingerprint` has it
                values.update(f"{name} {tuple(leaves[name].shape)}\n".encode())
                last = name
            values.update(entries)
            step(size)
    return Written(values.hexdigest(), sums | _write_metadata(folder, leaves, journal))


def pieces(leaves: Mapping[str, NewLeaf], make: Callable[[str, int], Any]) -> Generator[tuple[str, Any]]:
    """(name, `make(name, number)`) of every piece in the order of names, made by `AT_ONCE` threads a little ahead."""
    order = [(name, n) for name in sorted(leaves) for n in range(len(leaves[name].reads))]
    waiting: deque[tuple[str, int, Future]] = deque()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for name, number in order:
                size = leaves[name].bytes // len(leaves[name].reads)
                while waiting and (len(waiting) > AT_ONCE or sum(w[1] for w in waiting) + size > ROOM):
                    done = waiting.popleft()
                    yield done[0], done[2].result()
                waiting.append((name, size, pool.submit(make, name, number)))
            while waiting:
                done = waiting.popleft()
                yield done[0], done[2].result()
        finally:
            for w in waiting:
                w[2].cancel()


def _kept(path: Path, leaf: NewLeaf, known: str | None) -> np.ndarray | None:
    """A piece that an earlier process wrote, if it is as it was written."""
    if known is None or not path.is_file():
        return None
    with contextlib.suppress(OSError, ValueError):
        x = np.fromfile(path, leaf.dtype).reshape(leaf.shape[1:] if leaf.stacked else leaf.shape)
        if hashlib.sha256(raw(x)).hexdigest() == known:
            return x
    return None


def _zarray(leaf: NewLeaf) -> bytes:
    """Zarr's own description of an array, version 2."""
    dtype = "bfloat16" if leaf.dtype == BFLOAT16 else leaf.dtype.str
    facts = dict(
        chunks=[1, *leaf.shape[1:]] if leaf.stacked else list(leaf.shape), compressor=None, dimension_separator=".",
        dtype=dtype, fill_value=None, filters=None, order="C", shape=list(leaf.shape), zarr_format=2,
    )  # fmt: skip
    return json.dumps(facts).encode()


def _write_metadata(folder: Path, leaves: Mapping[str, NewLeaf], journal: Journal) -> dict[str, str]:
    """What Orbax wants to know of a tree of arrays."""
    tree = {}
    for name in sorted(leaves):
        keys = tuple(name.split("."))
        tree[str(keys)] = dict(
            key_metadata=[dict(key=key, key_type=2) for key in keys],
            value_metadata=dict(value_type="np.ndarray", skip_deserialize=False),
        )
    content = dict(
        tree_metadata=tree, use_ocdbt=False, use_zarr3=False, store_array_data_equal_to_fill_value=True, custom_metadata=None
    )  # fmt: skip
    whole: dict[str, Any] = dict(item_handlers=None, metrics={}, performance_metrics={}, custom_metadata={})
    whole |= dict(init_timestamp_nsecs=None, commit_timestamp_nsecs=None)
    return {
        name: journal.write(folder / name, f"{folder.name}/{name}", json.dumps(values).encode())
        for name, values in (("_METADATA", content), ("_CHECKPOINT_METADATA", whole))
    }


class Hashes:
    """sha256 of the files that weights come from, computed in a thread of their own while they are read."""

    def __init__(self, journal: Journal | None = None):
        self._journal, self._pool, self._over = journal, ThreadPoolExecutor(1), threading.Event()
        self._asked: dict[Path, Future[str]] = {}

    def ask(self, path: Path) -> Future[str]:
        """Of a file, now or later."""
        if path not in self._asked:
            self._asked[path] = self._pool.submit(self._compute, path)
        return self._asked[path]

    def close(self) -> None:
        """Ends what is being computed."""
        self._over.set()
        self._pool.shutdown(cancel_futures=True)

    def _compute(self, path: Path) -> str:
        name = f"source {os.fspath(path)!r}"
        known = self._journal.known(name) if self._journal else None
        if known:
            return known
        digest, block = hashlib.sha256(), memoryview(bytearray(CHUNK))
        with open(path, "rb", buffering=0) as file:
            while not self._over.is_set() and (size := file.readinto(block)):
                digest.update(block[:size])
        if self._journal and not self._over.is_set():
            self._journal.note(name, digest.hexdigest())
        return digest.hexdigest()
