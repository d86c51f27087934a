"""LoRAs merged while weights are converted, one public matrix at a time; see `dynaip_jax.adapters.lora`."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from dynaip_jax.adapters.lora import Asked, Scaled, by_tensor, change
from dynaip_jax.errors import UserError
from dynaip_jax.families.registry import FAMILIES
from dynaip_jax.flow import ScheduleConfig
from dynaip_jax.layers.compute import Compute
from dynaip_jax.public_names import Names, Tensor
from dynaip_jax.sampling.loras import LoRA, parse, read_loras, record
from dynaip_jax.storage.pieces import NewLeaf
from tools.convert_torch_weights.writing import Planned

ONE = threading.Lock()  # a matrix, and what is added to it, are in memory in float32


def with_loras(planned: Mapping[str, Planned], family: str, given: Sequence[str]) -> dict[str, Planned]:
    """The components with the LoRAs `given` (FILE or FILE=scale) in what will be read of them; what they say of themselves goes to
    stderr. Raises `UserError` for files that are none, do not fit, or change what no source has."""
    if not given:
        return dict(planned)
    kind = FAMILIES[family]
    usual = next(iter(kind.presets.values()))()
    configs = {**usual.configs, **{name: p.source.config for name, p in planned.items() if name in usual.configs}}
    computes = tuple((name, Compute()) for name in configs)
    whole = kind(tuple(configs.items()), computes, ScheduleConfig(), tuple(usual.text.items()))
    loras = read_loras([parse(text) for text in given], whole)
    for lora in loras:
        for note in lora.notes:
            print(f"note: {note}", file=sys.stderr)
        if lacking := {c.component for c in lora.changes} - planned.keys():
            raise UserError(
                f"`loras` {lora.path}: changes {min(lacking)}, which no `source` has; expected all that it changes; add a `source` with it"
            )
    names = whole.public_names().components
    return {name: _with(part, name, names.get(name), loras) for name, part in planned.items()}


def _with(part: Planned, component: str, names: Names | None, loras: Sequence[LoRA]) -> Planned:
    """A component with all of `loras` that change it."""
    own = [lora for lora in loras if any(c.component == component for c in lora.changes)]
    if names is None or not own:
        return part
    asked = by_tensor([Scaled(c, lora.scale) for lora in own for c in lora.changes if c.component == component])
    said = record(own)
    origins = [
        dict(lora=lora.file.name, scale=scale, sha256=digest)
        for lora, scale, digest in zip(own, said["lora_scale"], said["lora_fingerprint"], strict=True)
    ]
    return part._replace(leaves=_leaves(part.leaves, names, asked), merged=tuple(origins))


def _leaves(leaves: Mapping[str, NewLeaf], names: Names, asked: Mapping[str, list[Asked]]) -> dict[str, NewLeaf]:
    """The leaves, those pieces of them that a public tensor of `asked` lies in read with what is asked of it."""
    touched: dict[tuple[str, int], dict[str, None]] = defaultdict(dict)
    for name in asked:
        for piece in names.tensors[name].pieces:
            touched[piece.leaf, piece.block or 0][name] = None
    changed = dict(leaves)
    for path in dict.fromkeys(path for path, _ in touched):
        leaf = leaves[_dotted(path)]
        reads = list(leaf.reads)
        for number in (n for p, n in touched if p == path):
            work = [(names.tensors[name], asked[name]) for name in touched[path, number]]
            reads[number] = partial(_merged, leaves, work, path, number)
        changed[_dotted(path)] = leaf._replace(reads=tuple(reads))
    return changed


def _merged(
    leaves: Mapping[str, NewLeaf], work: Sequence[tuple[Tensor, list[Asked]]], path: str, number: int
) -> np.ndarray:
    """A piece of a leaf, of which all public tensors that lie in it are changed; a tensor's other leaves are read for it too."""
    with ONE:
        host: dict[str, Any] = {}
        for tensor, _ in work:
            for piece in tensor.pieces:
                leaf, block = leaves[_dotted(piece.leaf)], piece.block or 0
                held = host.setdefault(piece.leaf, {})
                if block not in held:
                    held[block] = np.array(leaf.reads[block](), leaf.dtype)
        plain = {p: held if leaves[_dotted(p)].stacked else held[0] for p, held in host.items()}
        for tensor, asked in work:
            change(plain, tensor, asked)
        return host[path][number]


def _dotted(path: str) -> str:
    return path.replace("/", ".")
