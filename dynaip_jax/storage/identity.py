"""What tells one model or adapter on disk from another, wherever it lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dynaip_jax.storage.folders import AnyPath

BLOCK = 1 << 24  # bytes read at once


def identity(manifest: Mapping[str, Any], *files: AnyPath) -> str:
    """sha256 over the content of a manifest, whatever the order of its keys, and of `files`. A manifest that holds the fingerprint of
    its weights needs no files."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()
