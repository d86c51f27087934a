"""Image-prompt adapters in the files of others: what a file is, whether it fits the model, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dynaip_jax.adapters.base import PublicConfig
from dynaip_jax.adapters.instantx import InstantXConfig
from dynaip_jax.adapters.ip_adapter import IPAdapterConfig
from dynaip_jax.adapters.lora_file import as_float32
from dynaip_jax.errors import UserError, reason, shortened
from dynaip_jax.families.base import Family
from dynaip_jax.sampling.conditions import CLIP_PROJECTION
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.storage.folders import as_path
from dynaip_jax.storage.pickled import Pickled
from dynaip_jax.storage.tensors import TensorFile, check_weights

ROWS = 4096  # of a matrix that are in memory in float32
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CONFIGS: tuple[type[PublicConfig], ...] = (IPAdapterConfig, InstantXConfig)
OTHERS = (  # what a name of a tensor starts with -> what the file is
    (("pulid_encoder.", "pulid_ca."), "a PuLID adapter, which reads faces"),
    (("redux_up.", "redux_down."), "a Redux model"),
    (("controlnet_", "input_hint_block."), "a ControlNet"),
    (("image_proj.", "ip_adapter."), "an image-prompt adapter of another backbone"),
)
EXPECTED = "expected XLabs' or InstantX's image-prompt adapter, or a folder that train.export writes"


class PublicFile(NamedTuple):
    """An adapter's file: its tensors, whose it is, and what errors call it."""

    tensors: Any
    kind: type[PublicConfig]
    where: str

    @classmethod
    def open(cls, path: str | Path) -> PublicFile:
        """Whose adapter a file is. Raises `UserError` for another kind of file."""
        where, file = f"`adapter` {path}", as_path(path)
        pickled = file.suffix in PICKLES and isinstance(file, Path)
        tensors: Any = Pickled([file]) if pickled else TensorFile(file)
        kind = next((kind for kind in CONFIGS if kind.mark in tensors), None)
        if kind is None:
            raise UserError(f"{where}: {_kind(list(tensors))}; {EXPECTED}")
        return cls(tensors, kind, where)

    def config(self, bundle: Bundle, family: Family) -> PublicConfig:
        """Its config, read off the shapes. Raises `UserError` for an adapter of another base, and for a bundle whose encoder of reference
        pictures is not what it reads."""
        where, shapes = self.where, {name: tuple(self.tensors.shape(name)) for name in self.tensors}
        try:
            config = self.kind.of_shapes(shapes, family.sites)
        except (KeyError, ValueError, IndexError, ArithmeticError) as e:
            raise UserError(f"{where}: shapes fit no {self.kind.maker} adapter ({reason(e)}); download it again") from e
        _check_shapes(where, shapes, config.shapes(), family)
        for what, made, found in (
            ("dual-stream blocks", config.depth, family.sites.double),
            ("single-stream blocks", getattr(config, "depth_single_blocks", family.sites.single), family.sites.single),
        ):
            if made != found:
                raise UserError(f"{where}: made for {made} {what}, the model has {found}; use an adapter for this base")
        for name in self.tensors:
            check_weights(where, name, self.tensors.dtype(name))
        _check_encoder(where, config, bundle, family)
        return config

    def read(self, config: PublicConfig, target: Any) -> dict[str, Any]:
        """The adapter's tree in the dtypes and shardings of `target`. Raises `UserError` for values that are not finite."""
        dtype = jax.tree.leaves(target)[0].dtype

        def read(name: str, *shape: int) -> np.ndarray:
            stored = self.tensors.shape(name)
            x = np.empty(stored[::-1], dtype)
            for start in range(0, stored[0], ROWS):
                rows = slice(start, start + ROWS)
                x[..., rows] = as_float32(self.tensors.part(name, (rows,)), self.where, name).T
            return x.reshape(shape)

        return jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), config.tree(read), target)


def _check_shapes(where: str, shapes: Mapping[str, Any], expected: Mapping[str, Any], family: Family) -> None:
    if wrong := sorted(dict(set(shapes.items()) ^ set(expected.items()))):
        name, inner = wrong[0], family.sites.heads * family.sites.head_dim
        raise UserError(
            f"{where}: {len(wrong)} tensors do not fit, the first {shortened(name, 80)}: found {shapes.get(name)}, expected "
            f"{expected.get(name)} for a base of width {inner}; use an adapter for this base"
        )


def clip_projection(bundle: Bundle) -> tuple[int, int]:
    """CLIP's pooled width, and that of its embedding, by the bundle. Raises `UserError` if it has no such matrix."""
    entry = bundle.manifest["components"].get(CLIP_PROJECTION)
    if entry is None:
        raise UserError(
            f"{bundle.path}: has no {CLIP_PROJECTION}, CLIP's visual_projection, which this adapter reads; convert the model again with "
            "the --clip-vision folder of a whole CLIP"
        )
    sizes = entry["config"].get("width"), entry["config"].get("projection_dim")
    if not all(type(n) is int and 0 < n < 1 << 20 for n in sizes):
        raise UserError(f"{bundle.path}: config of {CLIP_PROJECTION} in bundle.json; convert the model again")
    return sizes


def _check_encoder(where: str, config: PublicConfig, bundle: Bundle, family: Family) -> None:
    """Raises `UserError` unless the bundle's encoder gives what the adapter reads."""
    width = family.config(family.encoder).hidden_size
    pooled, given = clip_projection(bundle) if isinstance(config, IPAdapterConfig) else (width, width)
    if (pooled, given) != (width, config.embedding):
        public = dict(clip_vision="openai/clip-vit-large-patch14", siglip="google/siglip-so400m-patch14-384")
        raise UserError(
            f"{where}: reads {config.reads} of {config.embedding} numbers ({public[config.encoder]}), the model's encoder gives "
            f"{given}; convert the model again with that --clip-vision"
        )


def _kind(names: list[str]) -> str:
    """What a file seems to be."""
    for starts, kind in OTHERS:
        if any(name.startswith(starts) for name in names):
            return f"is {kind}, which is not read"
    if any(end in name for name in names for end in (".lora_", "lokr_", "hada_", ".processor.qkv_lora")):
        return "is a LoRA; pass it as `loras`"
    return f"is no image-prompt adapter (its first tensor is {shortened(min(names, default='missing'), 60)})"
