"""Files that others made: JSON of bounded size and depth, and questions to the file system whose failure is one line."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from dynaip_jax.errors import UserError, reason

JSON_BYTES = 1 << 24
JSON_DEPTH = 32


def parse_json(data: bytes, most: int = JSON_BYTES, *, halves: bool = False) -> Any:
    """What strict JSON in UTF-8 says. Raises `ValueError` for more than `most` bytes, for values nested more than 32 deep, for a
    name that an object has twice, for NaN and infinity, and, unless `halves`, for text with half a character (a lone surrogate)."""
    if len(data) > most:
        raise ValueError(f"{len(data)} bytes, at most {most} are read")
    text = data.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError as e:
        raise ValueError(f"nested more than {JSON_DEPTH} deep") from e
    _check(value, escapes="\\u" in text and not halves)
    return value


def read_json(path: Any, *, expected: str, remedy: str) -> dict[str, Any]:
    """The object in a JSON file, local or in a bucket; see `parse_json`. Raises `UserError`, which says what was `expected` and
    the `remedy`, for a file that is missing, cannot be read, or holds anything else."""
    try:
        value = parse_json(read_bytes(path, JSON_BYTES))
        if not isinstance(value, dict):
            raise ValueError(f"a JSON {type(value).__name__}, not an object")
        return value
    except FileNotFoundError as e:
        raise UserError(f"{path}: missing; expected {expected}; {remedy}") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable as JSON ({reason(e)}); expected {expected}; {remedy}") from e


def read_bytes(path: Any, most: int) -> bytes:
    """The content of a file, local or in a bucket. Raises `ValueError` for one of more than `most` bytes and for what is no plain
    file, such as a pipe, and `OSError`."""
    if isinstance(path, Path) and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("a folder" if path.is_dir() else "no plain file")
    with path.open("rb") as f:
        data = f.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most} bytes")
    return data


def is_file(path: Any) -> bool:
    """Whether there is a file; raises `UserError` where the system does not say, as in a closed folder."""
    return _asked(path, path.is_file)


def is_dir(path: Any) -> bool:
    """Whether there is a folder; raises `UserError` where the system does not say, as in a closed folder."""
    return _asked(path, path.is_dir)


def exists(path: Any) -> bool:
    """Whether there is anything; raises `UserError` where the system does not say, as in a closed folder."""
    return _asked(path, path.exists)


def _asked(path: os.PathLike[str], question: Any) -> bool:
    try:
        return question()
    except (OSError, ValueError) as e:
        raise UserError(
            f"{os.fspath(path)}: cannot be looked at ({reason(e)}); check the path and its folder's permissions"
        ) from e


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:60]!r} stands twice in an object")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _check(value: Any, escapes: bool) -> None:
    """Depth, and, where there are `escapes`, that texts are texts."""
    level, depth = [value], 0
    while level:
        containers = [x for x in level if isinstance(x, dict | list)]
        depth += 1
        if containers and depth > JSON_DEPTH:
            raise ValueError(f"nested more than {JSON_DEPTH} deep")
        if escapes:
            names = (name for x in containers if isinstance(x, dict) for name in x)
            for text in (*(x for x in level if isinstance(x, str)), *names):
                if any("\ud800" <= c <= "\udfff" for c in text):
                    raise ValueError(f"half a character in {text[:40]!r}")
        level = [y for x in containers for y in (x.values() if isinstance(x, dict) else x)]
