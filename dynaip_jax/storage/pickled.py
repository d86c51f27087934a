"""Pickled weights (.pt, .pth, .ckpt, .bin), read by torch with `weights_only`: nothing in them is run. torch is asked for by name."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynaip_jax.errors import UserError, reason
from dynaip_jax.storage.tensors import DTYPES, Tensors

NESTS = ("state_dict", "model_state_dict", "model", "module")  # under which trainers keep the weights
NAMES = {  # torch's dtypes, by safetensors' names
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class Pickled(Tensors):
    """The tensors of pickles, mapped into memory; those that a trainer keeps in a dictionary of the file under their own names, and those
    in a dictionary of dictionaries with a dot between.

    Raises `UserError` if torch is missing, and for files that hold anything but tensors, or are damaged.
    """

    def __init__(self, files: Sequence[Path]):
        self._tensors: dict[str, Any] = {}
        for path in files:
            for name, x in _tensors(path, _load(path)).items():
                if name in self._tensors:
                    raise UserError(f"{path}: {name} is in another shard too; expected it once; download it again")
                self._tensors[name] = x
        self.metadata: dict[str, str] = {}

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor."""
        import torch

        x = self._tensors[name]
        x = (x[index] if index and x.ndim else x).detach().contiguous()
        return x.reshape(-1).view(torch.uint8).numpy().view(self.dtype(name)).reshape(tuple(x.shape))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor."""
        return np.dtype(DTYPES[NAMES[str(self._tensors[name].dtype).removeprefix("torch.")]])


def _load(path: Path) -> Any:
    try:
        import torch
    except ImportError as e:
        raise UserError(
            f"{path}: is a pickle, which torch reads (with weights_only) and which is not installed; pip install torch, or save the "
            "weights as safetensors"
        ) from e
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    try:
        if zipped and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            raise ValueError("TorchScript")  # torch would warn first
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as e:  # whatever torch makes of it
        text = str(e)
        if "TorchScript" in text:
            why = "is a TorchScript archive, which would have to be run to be read"
        elif "Unsupported global" in text or "weights_only" in text.lower() or "Weights only" in text:
            why = "is a pickle that holds more than weights, which could run code and is not read"
        else:
            why = f"is no whole file of weights ({reason(e, 80)})"
        raise UserError(f"{path}: {why}; expected weights alone; use a safetensors file") from e


def _tensors(path: Path, content: Any) -> dict[str, Any]:
    import torch

    while isinstance(content, dict) and (nest := next((n for n in NESTS if isinstance(content.get(n), dict)), None)):
        content = content[nest]
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected tensors by name; use a safetensors file")
    if content and all(isinstance(name, str) and isinstance(part, dict) for name, part in content.items()):
        content = {f"{group}.{name}": x for group, part in content.items() for name, x in part.items()}
    for name, x in content.items():
        known = isinstance(x, torch.Tensor) and str(x.dtype).removeprefix("torch.") in NAMES
        if not isinstance(name, str) or not known or x.layout != torch.strided or x.is_meta or x.is_quantized:
            raise UserError(
                f"{path}: {str(name)[:60]} is no plain tensor; expected tensors by name alone; use a safetensors file"
            )
    return dict(content)
