"""The JSON files that say what a bundle or an adapter folder holds, and the identity of a tree of weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dynaip_jax import reading
from dynaip_jax.errors import UserError, shortened
from dynaip_jax.schema import typed
from dynaip_jax.storage.folders import AnyPath

FORMAT_VERSION = 1
BUNDLE_FILE, ADAPTER_FILE = "bundle.json", "adapter.json"
MANIFESTS = (BUNDLE_FILE, ADAPTER_FILE)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
OPTIONAL = dict(checksums=dict[str, str])  # fields that folders of older versions lack


def read_manifest(
    path: AnyPath, file: str, kind: str, field: str, remedy: str, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `file` in the folder `path`. Raises `UserError`, which names the option `field` and says the `remedy`, if
    there is none, if its "format" is not `kind`, if its version is another than `FORMAT_VERSION`, or if it lacks one of `fields` (name
    -> type, as in a dataclass) or has it in another type. Names in `OPTIONAL` may be missing."""
    if not reading.is_dir(path):
        raise UserError(f"`{field}` {path}: no such folder; expected one with {file}; check the path")
    if not reading.exists(path / file):
        raise UserError(f"`{field}` {path}: no {file} in it; expected a folder made by dynaip_jax; check the path")
    manifest = reading.read_json(path / file, expected=f"what dynaip_jax wrote, a {kind} file", remedy=remedy)
    if manifest.get("format") != kind:
        raise UserError(f'{path / file}: not a {kind} file; expected "format": "{kind}"; {remedy}')
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path / file}: format version {shortened(repr(manifest.get('format_version')), 40)}; this program reads version {FORMAT_VERSION}; "
            f"{remedy} with this version, or install the one that wrote it"
        )
    for name, expected in {**fields, **OPTIONAL}.items():
        if name not in manifest and name in OPTIONAL:
            continue
        try:
            if name not in manifest:
                raise ValueError(f"{name} is missing")
            typed(expected, manifest[name], name)
        except ValueError as e:
            raise UserError(f"{path / file}: {e}; expected what dynaip_jax wrote; {remedy}") from e
    return manifest


def write_manifest(path: AnyPath, kind: str, content: Mapping[str, Any]) -> None:
    """Writes `content` to the JSON file `path`, headed by the format `kind` and its version."""
    manifest = dict(format=kind, format_version=FORMAT_VERSION) | dict(content)
    path.write_text(json.dumps(manifest, indent=2) + "\n")


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tree -> {"a.b.c": leaf}."""
    from flax.traverse_util import flatten_dict

    return flatten_dict(params, sep=".")


def fingerprint(params: Mapping[str, Any]) -> str:
    """sha256 over names, shapes and `entry_digests` of a tree of arrays; values are rounded to bfloat16 first, so that a model has
    the same fingerprint in whichever precision it is stored."""
    digest = hashlib.sha256()
    for name, x in sorted(flatten(params).items()):
        digest.update(f"{name} {tuple(x.shape)}\n".encode() + entry_digests(np.asarray(x)))
    return digest.hexdigest()


def entry_digests(x: np.ndarray) -> bytes:
    """sha256 of each entry along the first axis, rounded to bfloat16, one after another: of blocks that are stacked, that of each."""
    entries = (entry.astype(BFLOAT16, copy=False) for entry in np.ascontiguousarray(x).reshape(x.shape or (1,)))
    return b"".join(hashlib.sha256(raw(entry)).digest() for entry in entries)


def raw(x: np.ndarray) -> memoryview:
    """The bytes of an array whose rows lie one after another."""
    return x.reshape(-1).view(np.uint8).data
