"""SigLIP's vision tower: from transformers' `SiglipVisionModel`, a whole `SiglipModel`, or the tower alone in one file.

Left out on purpose: the text tower, the scale and the bias of its loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax

from dynaip_jax.errors import UserError, reason
from dynaip_jax.models.siglip import SiglipVision, SiglipVisionConfig
from tools.convert_torch_weights.clip import TEXT, VISION, blocks
from tools.convert_torch_weights.engine import (
    Leaf,
    Part,
    Table,
    abstract_params,
    conv,
    convert,
    copy,
    linear,
    norm,
    numbered,
)
from tools.convert_torch_weights.selection import Selection

HEAD = 72  # the width of a head of so400m
PROBE = "head.probe"  # no CLIP has it
COMPANY = ("logit_scale", "logit_bias")


def is_siglip(names: Mapping[str, Any]) -> bool:
    """Whether they are of its vision tower, with or without the other one."""
    return any(name in (PROBE, f"{VISION}{PROBE}") for name in names)


def table(c: SiglipVisionConfig, prefix: str = "") -> Table:
    """Every leaf of `SiglipVision(c)` and the source tensor it is made of, whose name starts with `prefix`."""
    w, m, attn = c.hidden_size, c.intermediate_size, f"{prefix}head.attention"
    head: Table = {"head/probe": Leaf((Part(f"{prefix}{PROBE}", (1, 1, w)),))}
    for i, name in enumerate("qkv"):
        rows = (0, i * w, (i + 1) * w)
        head[f"head/{name}_proj/kernel"] = Leaf((Part(f"{attn}.in_proj_weight", (3 * w, w), *rows),), (1, 0))
        head[f"head/{name}_proj/bias"] = Leaf((Part(f"{attn}.in_proj_bias", (3 * w,), *rows),))
    return {
        "position_embedding": copy(f"{prefix}embeddings.position_embedding.weight", c.tokens, w),
        **conv("patch_embedding", f"{prefix}embeddings.patch_embedding", w, 3, c.patch_size),
        **blocks(c, prefix),
        **norm("post_layernorm", f"{prefix}post_layernorm", w),
        **head,
        **linear("head/out_proj", f"{attn}.out_proj", out=w, in_=w),
        **norm("head/layernorm", f"{prefix}head.layernorm", w),
        **linear("head/fc1", f"{prefix}head.mlp.fc1", out=m, in_=w),
        **linear("head/fc2", f"{prefix}head.mlp.fc2", out=w, in_=m),
    }


def params_from_torch(tensors: Mapping[str, Any], config: SiglipVisionConfig, **options: Any) -> dict[str, Any]:
    """Parameters of `SiglipVision(config)` from `tensors` (name -> array); `options` are those of `engine.convert`.

    Raises `UserError` listing names that are missing, unexpected or of the wrong shape, and tensors that are not finite.
    """
    prefix = VISION if f"{VISION}{PROBE}" in tensors else ""
    ids = f"{prefix}embeddings.position_ids"
    kept = Selection(tensors, lambda n: n not in COMPANY and n != ids and not n.startswith(TEXT))
    return convert("siglip", kept, table(config, prefix), target(config), **options)


@lru_cache(maxsize=8)
def target(config: SiglipVisionConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of `SiglipVision(config)`."""
    return abstract_params(SiglipVision(config).init, *SiglipVision.inputs_spec(config).values())


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> SiglipVisionConfig:
    """The sizes of a tower without a config; its heads are as wide as so400m's. Raises `UserError` if they do not fit."""
    prefix = VISION if f"{VISION}{PROBE}" in shapes else ""
    try:
        width, _, patch, _ = shapes[f"{prefix}embeddings.patch_embedding.weight"]
        if width % HEAD:
            raise ValueError(f"width {width}, no multiple of {HEAD}, the width of so400m's heads")
        return SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=shapes[f"{prefix}head.mlp.fc1.weight"][0],
            num_hidden_layers=numbered(shapes, f"{prefix}encoder.layers."),
            num_attention_heads=width // HEAD,
            image_size=patch * math.isqrt(shapes[f"{prefix}embeddings.position_embedding.weight"][0]),
            patch_size=patch,
        )
    except KeyError as e:
        raise UserError(f"siglip: tensor {e.args[0]} is missing; expected a whole tower; use another file") from e
    except (ValueError, IndexError, ArithmeticError) as e:
        raise UserError(
            f"siglip: shapes do not fit so400m ({reason(e)}); pass the folder that holds its config.json"
        ) from e
