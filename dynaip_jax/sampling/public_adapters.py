"""Image-prompt adapters in the files of others: what a file is, whether it fits the model, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynaip_jax.adapters.ip_adapter import BLOCK, PROJECTION, IPAdapterConfig
from dynaip_jax.adapters.lora_file import as_float32
from dynaip_jax.errors import UserError, reason, shortened
from dynaip_jax.families.base import Family
from dynaip_jax.sampling.conditions import CLIP_PROJECTION
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.storage.folders import as_path
from dynaip_jax.storage.tensors import TensorFile, check_weights

OTHERS = (  # what a name of a tensor starts with -> what the file is
    (("pulid_encoder.", "pulid_ca."), "a PuLID adapter, which reads faces"),
    (("redux_up.", "redux_down."), "a Redux model"),
    (("controlnet_", "input_hint_block."), "a ControlNet"),
    (("image_proj.proj.0.", "ip_adapter.0.to_k_ip"), "an InstantX adapter, which reads SigLIP's features"),
    (("image_proj.", "ip_adapter."), "an image-prompt adapter of another backbone"),
)
EXPECTED = "expected XLabs' image-prompt adapter (ip_adapter.safetensors), or a folder that train.export writes"


def open_public(path: str | Path, bundle: Bundle, family: Family) -> IPAdapterConfig:
    """The config of an adapter in a file of others, read off its header. Raises `UserError` for another kind of file, for one of another
    base, and for a bundle without the CLIP that it reads."""
    where, file = f"`adapter` {path}", _open(path)
    if f"{PROJECTION}.proj.weight" not in file:
        raise UserError(f"{where}: {_kind(list(file))}; {EXPECTED}")
    shapes = {name: tuple(file.shape(name)) for name in file}
    try:
        config = IPAdapterConfig.of_shapes(shapes, family.sites)
    except (KeyError, ValueError, IndexError) as e:
        raise UserError(f"{where}: shapes fit no XLabs adapter ({reason(e)}); download it again") from e
    expected = config.shapes()
    if wrong := sorted(dict(set(shapes.items()) ^ set(expected.items()))):
        name, inner = wrong[0], family.sites.heads * family.sites.head_dim
        raise UserError(
            f"{where}: {len(wrong)} tensors do not fit, the first {shortened(name, 80)}: found {shapes.get(name)}, expected "
            f"{expected.get(name)} for a base of width {inner}; use an adapter for this base"
        )
    if config.depth != family.sites.double:
        raise UserError(
            f"{where}: made for {config.depth} dual-stream blocks, the model has {family.sites.double}; use an adapter for this base"
        )
    for name in file:
        check_weights(where, name, file.dtype(name))
    _check_clip(where, config, bundle, family)
    return config


def read_public(path: str | Path, config: IPAdapterConfig, target: Any) -> dict[str, Any]:
    """The adapter's tree in the dtypes and shardings of `target`. Raises `UserError` for values that are not finite."""
    where, file, c = f"`adapter` {path}", _open(path), config

    def read(name: str, *shape: int) -> np.ndarray:
        x = as_float32(file[name], where, name)
        return (x.T if x.ndim == 2 else x).reshape(shape)

    def stacked(kind: str, end: str, *shape: int) -> np.ndarray:
        return np.stack([read(f"{BLOCK.format(n, kind)}.{end}", *shape) for n in range(c.depth)])

    heads = (c.num_heads, c.head_dim)
    tree = dict(
        proj=dict(
            kernel=read(f"{PROJECTION}.proj.weight", c.embedding, c.tokens, c.width),
            bias=read(f"{PROJECTION}.proj.bias", c.tokens, c.width),
        ),
        norm=dict(scale=read(f"{PROJECTION}.norm.weight", c.width), bias=read(f"{PROJECTION}.norm.bias", c.width)),
        key=stacked("k", "weight", c.width, *heads),
        key_bias=stacked("k", "bias", *heads),
        value=stacked("v", "weight", c.width, *heads),
        value_bias=stacked("v", "bias", *heads),
    )
    return jax.tree.map(lambda x, t: jax.device_put(jnp.asarray(x, t.dtype), t.sharding), tree, target)


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


def _check_clip(where: str, config: IPAdapterConfig, bundle: Bundle, family: Family) -> None:
    width, embedding = clip_projection(bundle)
    if (width, embedding) != (family.config("clip_vision").hidden_size, config.embedding):
        raise UserError(
            f"{where}: reads CLIP's embedding of {config.embedding} numbers (openai/clip-vit-large-patch14), the model's CLIP gives "
            f"{embedding}; convert the model again with that --clip-vision"
        )


def _open(path: str | Path) -> TensorFile:
    file = as_path(path)
    if file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UserError(f"`adapter` {path}: a pickle by its name; expected safetensors; {EXPECTED}")
    return TensorFile(file)


def _kind(names: list[str]) -> str:
    """What a file seems to be."""
    for starts, kind in OTHERS:
        if any(name.startswith(starts) for name in names):
            return f"is {kind}, which is not read"
    if any(end in name for name in names for end in (".lora_", "lokr_", "hada_", ".processor.qkv_lora")):
        return "is a LoRA; pass it as `loras`"
    return f"is no image-prompt adapter (its first tensor is {shortened(min(names, default='missing'), 60)})"
