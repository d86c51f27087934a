"""LoRAs that a model is loaded with: their files, how strongly each acts, and what the settings of pictures say of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from dynaip_jax import reading
from dynaip_jax.adapters.lora import Change, Scaled, merge
from dynaip_jax.adapters.lora_file import as_float32, header_of_config, read_changes
from dynaip_jax.errors import UserError, shortened
from dynaip_jax.families.base import Family
from dynaip_jax.public_names import PublicNames
from dynaip_jax.storage.folders import AnyPath, as_path, local_copy, sha256_of
from dynaip_jax.storage.tensors import TensorFile

LARGEST = 1e3  # of a scale
MOST = 64  # files
IN_FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pickle")
Given: TypeAlias = Any  # a path, (path, scale), or several in a sequence or as path -> scale


class LoRA(NamedTuple):
    """A file, its scale, and what it changes; `notes`: lines worth showing."""

    path: str
    scale: float
    file: AnyPath
    changes: list[Change]
    notes: list[str]


def several(given: Given) -> list[tuple[str, float]]:
    """Paths and scales. Raises `UserError` for what is neither, and for scales that are not finite."""
    if isinstance(given, (str, os.PathLike)):
        given = [given]
    if isinstance(given, Mapping):
        given = list(given.items())
    if not isinstance(given, Iterable):
        raise UserError(f"`loras` {shortened(str(given), 60)}: expected files, each alone or with its scale")
    found = [_one(item) for item in given]
    if len(found) > MOST:
        raise UserError(f"`loras`: {len(found)} files; expected at most {MOST}; merge some")
    return found


def parse(text: str) -> tuple[str, float]:
    """FILE or FILE=scale of a command line."""
    path, _, scale = text.rpartition("=")
    try:
        return _one((path, float(scale))) if path else _one(text)
    except ValueError:
        return _one(text)


def _one(item: Any) -> tuple[str, float]:
    path, scale = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, 1.0)
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise UserError(f"`loras` {shortened(str(item), 60)}: expected a file, alone or with its scale")
    if isinstance(scale, (bool, str)) or not hasattr(scale, "__float__") or not abs(float(scale)) <= LARGEST:
        raise UserError(
            f"`loras` {os.fspath(path)}: scale {shortened(str(scale), 40)}; expected a number of at most {LARGEST:g} in size"
        )
    return os.fspath(path), float(scale)


def read_loras(given: Given, family: Family) -> list[LoRA]:
    """The LoRAs in files, checked by their headers. Raises `UserError` for files that are none, or not for this family's sizes."""
    pairs = several(given)
    names = family.public_names() if pairs else None
    return [] if names is None else [_read(path, scale, names) for path, scale in pairs]


def merged(family: Family, component: str, params: dict[str, Any], loras: Sequence[LoRA]) -> dict[str, Any]:
    """A component's parameters with the LoRAs in them; see `adapters.lora.merge`."""
    changes = [Scaled(c, lora.scale) for lora in loras for c in lora.changes if c.component == component]
    return merge(params, family.public_names().components[component], changes) if changes else params


def record(loras: Sequence[LoRA]) -> dict[str, Any]:
    """What the settings of pictures say of them; nothing without any."""
    if not loras:
        return {}
    return dict(
        lora=[lora.path for lora in loras],
        lora_scale=[lora.scale for lora in loras],
        lora_fingerprint=[_sha256(lora.file) for lora in loras],
    )


def _sha256(file: AnyPath) -> str:
    with local_copy(file) as path:
        return sha256_of(path)


def _read(path: str, scale: float, names: PublicNames) -> LoRA:
    where = f"`loras` {path}"
    folder = as_path(path)
    file, metadata = folder, {}
    if reading.is_dir(folder):
        inside = [name for name in IN_FOLDERS if reading.is_file(folder / name)]
        if len(inside) != 1:
            raise UserError(
                f"{where}: a folder with {len(inside)} of {', '.join(IN_FOLDERS)}; expected one; pass a file"
            )
        file = folder / inside[0]
        if inside[0] == IN_FOLDERS[0]:
            config = reading.read_json(
                folder / "adapter_config.json", expected="it as PEFT writes it", remedy="download the folder again"
            )
            metadata = header_of_config(config, names)
    if file.suffix in PICKLES:
        raise UserError(f"{where}: a pickle by its name; expected safetensors; save it as such, or use another file")
    if not reading.is_file(file):
        raise UserError(f"{where}: no such file; expected a LoRA in safetensors; check the path")
    tensors = TensorFile(file)

    def read(name: str) -> np.ndarray:
        return as_float32(tensors[name], where, name)

    for name in tensors:
        if tensors.dtype(name).kind not in "fV" and not name.endswith((".alpha", ".reshape_weight")):
            raise UserError(
                f"{where}: {shortened(name, 90)} holds {tensors.dtype(name)}; expected floats; use another file"
            )
    changes, notes = read_changes(where, tensors, tensors.metadata | metadata, names, read)
    return LoRA(path, scale, file, changes, notes)
