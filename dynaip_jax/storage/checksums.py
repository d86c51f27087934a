"""Checksums of the files in a folder: written when it is made, compared when it is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from dynaip_jax.errors import UserError, reason
from dynaip_jax.storage.folders import AnyPath

AT_ONCE = 8  # files
CHUNK = 1 << 24  # bytes


def of_files(folder: AnyPath, kept: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name in `folder` -> sha256 of every file under it, sorted; those of `kept` are not read."""
    given = kept or {}
    names = sorted(os.path.relpath(file, folder).replace(os.sep, "/") for file in _files(folder))
    computed = dict(_computed(folder, [name for name in names if name not in given]))
    return {name: given.get(name) or computed[name] for name in names}


def verify(folder: AnyPath, stated: Mapping[str, str], part: str, where: str, remedy: str) -> None:
    """Raises `UserError` unless the files of `folder` that are `part` or lie in it are those that `stated`, which stands in the file
    `where`, gives the sha256 of. A part of which nothing is stated is not looked at."""
    mine = {name: value for name, value in stated.items() if name == part or name.startswith(f"{part}/")}
    if stated and (not mine or any(".." in name.split("/") for name in mine)):
        raise UserError(
            f"{folder / where}: its checksums name no files of {part}, or others; expected those of its files; {remedy}"
        )
    try:
        for name, value in _computed(folder, mine):
            if value != mine[name]:
                raise UserError(
                    f"{folder / name}: damaged or changed, its sha256 is not the one in {where}; expected the file as it was written; "
                    f"{remedy} (verify=False in Python reads it all the same)"
                )
    except OSError as e:
        raise UserError(
            f"{folder / part}: cannot be compared with {where} ({reason(e)}); expected all of its files; {remedy}"
        ) from e


def _computed(folder: AnyPath, names: Collection[str]) -> Iterator[tuple[str, str]]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True)


def _sha256(path: AnyPath) -> str:
    if not path.is_file():
        raise OSError("a file is missing, or is no plain file")
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: AnyPath) -> Iterator[AnyPath]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry
