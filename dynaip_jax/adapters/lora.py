"""LoRAs and their kin: a file's factors merged into the weights that they were trained beside.

W' = W + scale * delta, in float32, one public matrix `[out, in]` at a time, rounded to the weights' own dtype once, whatever the number
of files. delta, with r the rows of the down matrix and alpha / r = 1 where a file has no alpha:

- LoRA: alpha / r * up down (rsLoRA: alpha / sqrt(r));
- LoHa: alpha / r * (w1_a w1_b) * (w2_a w2_b); LoKr: kron(w1, w2), times alpha / r only where one of them is a product;
- a full difference, or a replacement minus W;
- DoRA on top of any: (W + delta) * magnitude / |W + delta| - W, the norm over the inputs of each row or the rows of each input.

Sources: Hu et al., arXiv 2106.09685; LyCORIS, arXiv 2309.14859; DoRA, arXiv 2402.09353; PEFT; ComfyUI `weight_adapter`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dynaip_jax.errors import UserError
from dynaip_jax.public_names import Module, Names, Tensor

Read = Callable[[str], np.ndarray]  # the tensor of a role, float32


@dataclass(frozen=True)
class Change:
    """What a file asks of one module: its tensors by role (`lora_file.SUFFIXES`), read by `read`; `alpha`: of low-rank factors, None
    for their rank, over its square root with `rslora`; `where`: what errors call it."""

    component: str
    module: Module
    tensors: Mapping[str, str]
    read: Read
    alpha: float | None
    rslora: bool
    where: str

    def has(self, *roles: str) -> bool:
        """Whether all these roles have tensors."""
        return all(role in self.tensors for role in roles)

    def get(self, role: str, *shape: int) -> np.ndarray:
        """The tensor of a role, in that shape."""
        x = self.read(self.tensors[role])
        return x.reshape(shape) if shape else x.reshape(x.shape[0], -1) if x.ndim > 2 else x

    def new_weight(self, weight: np.ndarray, scale: float) -> np.ndarray:
        """The module's `weight`, float32, with this change at a scale."""
        if self.has("set"):
            new = self.get("set", *weight.shape)
            return new if scale == 1 else weight + scale * (new - weight)
        delta = sum((part(self) for part in DELTAS if part.known(self)), np.zeros((), np.float32))
        delta = np.broadcast_to(delta, weight.shape)
        if self.has("magnitude"):
            delta = self._decomposed(weight + delta) - weight
        return weight + np.float32(scale) * delta

    def new_bias(self, bias: np.ndarray, scale: float) -> np.ndarray:
        """The module's `bias`, float32, with this change at a scale."""
        if self.has("set_bias"):
            new = self.get("set_bias", *bias.shape)
            return new if scale == 1 else bias + scale * (new - bias)
        if self.has("diff_bias"):
            bias = bias + np.float32(scale) * self.get("diff_bias", *bias.shape)
        if self.has("up_bias"):
            bias = bias + np.float32(scale * self.scaling(self.get("down"))) * self.get("up_bias", *bias.shape)
        return bias

    def scaling(self, down: np.ndarray) -> float:
        """alpha / r of factors whose inner one is `down` `[r, in]`."""
        r = down.shape[0]
        return 1.0 if self.alpha is None else self.alpha / (r**0.5 if self.rslora else r)

    @property
    def changes_bias(self) -> bool:
        return any(role in self.tensors for role in ("set_bias", "diff_bias", "up_bias"))

    @property
    def changes_weight(self) -> bool:
        return self.has("set") or self.has("magnitude") or any(part.known(self) for part in DELTAS)

    def _decomposed(self, new: np.ndarray) -> np.ndarray:
        magnitude = self.get("magnitude")
        of_inputs = magnitude.ndim == 2 and magnitude.shape[0] == 1
        norm = np.linalg.norm(new, axis=0 if of_inputs else 1, keepdims=True)
        return new * (magnitude.reshape(norm.shape) / np.maximum(norm, np.finfo(np.float32).tiny))


class Delta(NamedTuple):
    """A kind of difference: whether a change has it, and how it is computed, float32 `[out, in]`."""

    known: Callable[[Change], bool]
    compute: Callable[[Change], np.ndarray]

    def __call__(self, change: Change) -> np.ndarray:
        return self.compute(change)


def _lora(change: Change) -> np.ndarray:
    down, up = change.get("down"), change.get("up")
    return np.float32(change.scaling(down)) * (up @ down)


def _factor(change: Change, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """A factor of LoHa or LoKr, and the inner matrix of it where it is a product."""
    if change.has(name):
        return change.get(name), None
    inner = change.get(f"{name}_b")
    return change.get(f"{name}_a") @ inner, inner


def _loha(change: Change) -> np.ndarray:
    (first, inner), (second, _) = (_factor(change, f"hada_w{n}") for n in (1, 2))
    assert inner is not None
    return np.float32(change.scaling(inner)) * (first * second)


def _lokr(change: Change) -> np.ndarray:
    (first, of_first), (second, of_second) = (_factor(change, f"lokr_w{n}") for n in (1, 2))
    inner = of_first if of_second is None else of_second
    return np.float32(1.0 if inner is None else change.scaling(inner)) * np.kron(first, second)


def _diff(change: Change) -> np.ndarray:
    return change.get("diff", *change.module.shape)


DELTAS = (
    Delta(lambda c: c.has("down", "up"), _lora),
    Delta(lambda c: c.has("hada_w1_a"), _loha),
    Delta(lambda c: c.has("lokr_w1") or c.has("lokr_w1_a"), _lokr),
    Delta(lambda c: c.has("diff"), _diff),
)


class Scaled(NamedTuple):
    """A change, and how strongly it acts: 0 leaves the weights as they are, bit for bit."""

    change: Change
    scale: float


Asked = tuple[Scaled, bool]  # and whether it is of the module's bias


def merge(params: Mapping[str, Any], names: Names, changes: Sequence[Scaled]) -> dict[str, Any]:
    """A component's parameters with the `changes` merged in, in their order; each leaf keeps its dtype and sharding.

    Leaves that nothing changes are the same arrays. Others go through the host's memory, those of equal blocks together.
    Raises `UserError` for tensors and results that are not finite.
    """
    leaves: dict[str, Any] = flatten_dict(dict(params), sep="/")
    del params
    asked = by_tensor(changes)
    together: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in asked:
        together[tuple(piece.leaf for piece in names.tensors[name].pieces)].append(name)
    for paths, tensors in together.items():
        host = {path: np.array(leaves[path]) for path in paths}
        for name in tensors:
            change(host, names.tensors[name], asked[name])
        for path in paths:
            leaves[path] = _placed(host.pop(path), leaves[path])
    return unflatten_dict(leaves, sep="/")


def by_tensor(changes: Sequence[Scaled]) -> dict[str, list[Asked]]:
    """Public tensor -> what is to be done to it, in order. Changes at scale 0 are left out."""
    asked: dict[str, list[Asked]] = defaultdict(list)
    for scaled in (scaled for scaled in changes if scaled.scale):
        module = scaled.change.module
        if scaled.change.changes_weight:
            asked[module.weight].append((scaled, False))
        if scaled.change.changes_bias and module.bias is not None:
            asked[module.bias].append((scaled, True))
    return dict(asked)


def change(leaves: Mapping[str, Any], tensor: Tensor, asked: Sequence[Asked]) -> None:
    """Does what is `asked` to the public tensor that lies in `leaves`: path -> array, or block -> array."""
    value = gather(leaves, tensor)
    for scaled, is_bias in asked:
        _apply(value, scaled, is_bias)
    scatter(leaves, tensor, value)


def gather(leaves: Mapping[str, Any], tensor: Tensor) -> np.ndarray:
    """The public tensor that lies in `leaves`, float32 in torch's order."""
    value = np.empty(tensor.shape, np.float32)
    for path, block, rows, columns, turned in tensor.pieces:
        x = leaves[path] if block is None else leaves[path][block]
        if columns is None:
            value[slice(*rows)] = x.reshape(-1)
        else:
            value[slice(*rows), slice(*columns)] = x.reshape(columns[1] - columns[0], -1).T if turned else x
    return value


def scatter(leaves: Mapping[str, Any], tensor: Tensor, value: np.ndarray) -> None:
    """Writes a public tensor into the `leaves` that hold it, in their dtype."""
    for path, block, rows, columns, turned in tensor.pieces:
        leaf = leaves[path] if block is None else leaves[path][block]
        x = value[slice(*rows)] if columns is None else value[slice(*rows), slice(*columns)]
        leaf[...] = (x.T if columns is not None and turned else x).reshape(leaf.shape).astype(leaf.dtype)


def _apply(value: np.ndarray, scaled: Scaled, is_bias: bool) -> None:
    """Changes the module's rows of a public tensor."""
    change, scale = scaled
    rows = change.module.rows
    own = np.concatenate([value[slice(*span)] for span in rows]) if len(rows) > 1 else value[slice(*rows[0])]
    with np.errstate(over="ignore", invalid="ignore"):
        new = (change.new_bias if is_bias else change.new_weight)(own, scale)
    if not np.isfinite(new).all():
        raise UserError(f"{change.where}: makes weights that are not finite at scale {scale:g}; pass a smaller scale")
    at = 0
    for start, stop in rows:
        value[start:stop] = new[at : at + stop - start]
        at += stop - start


def _placed(new: np.ndarray, old: Any) -> Any:
    """An array where the old one is, if that is on devices."""
    return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new
