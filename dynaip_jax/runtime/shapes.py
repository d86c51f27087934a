"""Shapes of networks' parameters, kept on disk beside compiled programs: to find them is to trace a network, for the embedded model a
sixth of the time to its first picture."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from dynaip_jax.runtime.compiling import VARIABLE

FOLDER = "shapes"  # beside the programs
PACKAGE = Path(__file__).parents[1]
CODE = ("adapters", "families", "layers", "models")  # what shapes depend on


def kept(network: str, find: Callable[[], Any]) -> Any:
    """The tree of boxed shapes that `find()` makes, from the folder of compiled programs if an earlier process left it there.

    `network`: all that the tree depends on, but for code. What was kept by other code or other versions is not used, nor what cannot be
    read; without a folder, or if it cannot be written, nothing is kept.
    """
    file = _file(network)
    if file is None:
        return find()
    made_by = _made_by()
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        found = json.loads(file.read_bytes())
        if found["made_by"] == made_by and found["network"] == network:
            return _tree(found["shapes"])
    tree = find()
    content = dict(made_by=made_by, network=network, shapes=_plain(tree))
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(content))
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)  # of a full disk
    return tree


def named(network: nn.Module) -> str:
    """A network's class and all that it was given, which is what its shapes depend on."""
    given = {f.name: getattr(network, f.name) for f in dataclasses.fields(network) if f.name not in ("parent", "name")}
    return f"{type(network).__module__}.{type(network).__qualname__} {given}"


def _file(network: str) -> Path | None:
    """Where the shapes of a network are kept; None without a folder on a disk of this machine."""
    folder = os.environ.get(VARIABLE, "")
    if not folder or "://" in folder or not os.path.isdir(folder):
        return None
    return Path(folder, FOLDER, f"{hashlib.sha256(network.encode()).hexdigest()[:32]}.json")


@cache
def _made_by() -> str:
    """A digest of the code and of the versions that shapes depend on."""
    facts = [f"{name} {version(name)}" for name in ("flax", "jax", "numpy")]
    return hashlib.sha256("\n".join([*facts, *_stamps()]).encode()).hexdigest()


def _stamps() -> Iterator[str]:
    for folder in CODE:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            found = path.stat()
            yield f"{path.relative_to(PACKAGE)} {found.st_size} {found.st_mtime_ns}"


def _plain(tree: Any) -> Any:
    """A tree of boxed shapes as JSON holds it: a leaf is [shape, dtype, names of its axes or null]."""
    if isinstance(tree, Mapping):
        return {name: _plain(value) for name, value in tree.items()}
    names = tree.names if isinstance(tree, nn.LogicallyPartitioned) else None
    value = nn.meta.unbox(tree)
    return [value.shape, value.dtype.name, names]


def _tree(plain: Any) -> Any:
    """The inverse of `_plain`."""
    if isinstance(plain, dict):
        return {name: _tree(value) for name, value in plain.items()}
    shape, dtype, names = plain
    value = jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(dtype))
    return value if names is None else nn.LogicallyPartitioned(value, tuple(names))
