"""CLIP in single files, without a config: transformers' names, and OpenAI's, which open_clip has too; sizes are read off shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dynaip_jax import schema
from dynaip_jax.errors import UserError, reason
from dynaip_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from tools.convert_torch_weights import clip
from tools.convert_torch_weights.engine import Leaf, Part, Table, conv, convert, copy, linear, norm, numbered, stack
from tools.convert_torch_weights.selection import Selection

PROJECTIONS = ("visual_projection.weight", "visual.proj")  # transformers' `[out, in]`, OpenAI's `[in, out]`
TEXT_PROJECTIONS = ("text_projection.weight", "text_projection")
HEAD = 64  # the width of a head of every CLIP
TEXT_MARK, VISION_MARK = "token_embedding.weight", "visual.class_embedding"  # in OpenAI's names
OTHERS = (
    "logit_scale",
    "logit_bias",
    "text_projection",
    "visual.proj",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
)


def text_config(shapes: Mapping[str, tuple[int, ...]]) -> CLIPTextConfig:
    """The text tower's sizes; the last token of the vocabulary ends a text, as in OpenAI's. Raises `UserError` if they do not fit."""
    own = is_open(shapes)
    prefix = "" if own or not any(n.startswith(clip.TEXT) for n in shapes) else clip.TEXT
    names = (TEXT_MARK, "positional_embedding", "transformer.resblocks.", "0.mlp.c_fc.weight") if own else (
        f"{prefix}embeddings.token_embedding.weight", f"{prefix}embeddings.position_embedding.weight",
        f"{prefix}encoder.layers.", "0.mlp.fc1.weight",
    )  # fmt: skip

    def read() -> CLIPTextConfig:
        words, width = shapes[names[0]]
        return CLIPTextConfig(
            hidden_size=width,
            intermediate_size=shapes[names[2] + names[3]][0],
            num_hidden_layers=numbered(shapes, names[2]),
            num_attention_heads=width // HEAD,
            vocab_size=words,
            max_position_embeddings=shapes[names[1]][0],
            eos_token_id=words - 1,
        )

    return _read("clip_text", read)


def vision_config(shapes: Mapping[str, tuple[int, ...]]) -> CLIPVisionConfig:
    """The vision tower's sizes; OpenAI's activation, which leaves no trace. Raises `UserError` if they do not fit."""
    own = is_open(shapes)
    prefix = "" if own or not any(n.startswith(clip.VISION) for n in shapes) else clip.VISION
    names = ("visual.conv1.weight", "visual.positional_embedding", "visual.transformer.resblocks.", "0.mlp.c_fc.weight") if own else (
        f"{prefix}embeddings.patch_embedding.weight", f"{prefix}embeddings.position_embedding.weight",
        f"{prefix}encoder.layers.", "0.mlp.fc1.weight",
    )  # fmt: skip

    def read() -> CLIPVisionConfig:
        width, _, patch, _ = shapes[names[0]]
        return CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=shapes[names[2] + names[3]][0],
            num_hidden_layers=numbered(shapes, names[2]),
            num_attention_heads=width // HEAD,
            image_size=patch * math.isqrt(shapes[names[1]][0] - 1),
            patch_size=patch,
        )

    return _read("clip_vision", read)


def _read(component: str, read: Any) -> Any:
    try:
        return read()
    except KeyError as e:
        raise UserError(
            f"{component}: tensor {e.args[0]} is missing; expected a whole CLIP tower; use another file"
        ) from e
    except (ValueError, IndexError, ArithmeticError) as e:
        raise UserError(
            f"{component}: shapes do not fit CLIP ({reason(e)}); expected such as clip_l.safetensors; use another file"
        ) from e


def is_open(names: Mapping[str, Any]) -> bool:
    """Whether they are OpenAI's and open_clip's."""
    return TEXT_MARK in names or VISION_MARK in names


def text_params(tensors: Mapping[str, Any], config: CLIPTextConfig, **options: Any) -> dict[str, Any]:
    """Parameters of `CLIPText(config)` in either naming: see `clip.vision_params_from_torch`."""
    if not is_open(tensors):
        return clip.text_params_from_torch(tensors, config, **options)
    w = config.hidden_size
    table: Table = {
        "token_embedding/embedding": copy(TEXT_MARK, config.vocab_size, w),
        "position_embedding": copy("positional_embedding", config.max_position_embeddings, w),
        **_blocks(config, "transformer.resblocks."),
        **norm("final_layer_norm", "ln_final", w),
    }
    kept = Selection(tensors, lambda n: not n.startswith("visual.") and n not in OTHERS)
    return convert("clip_text", kept, table, clip.text_target(config), **options)


def vision_params(tensors: Mapping[str, Any], config: CLIPVisionConfig, **options: Any) -> dict[str, Any]:
    """Parameters of `CLIPVision(config)` in either naming: see `clip.vision_params_from_torch`."""
    if not is_open(tensors):
        return clip.vision_params_from_torch(tensors, config, **options)
    w = config.hidden_size
    table: Table = {
        "class_embedding": copy(VISION_MARK, w),
        "position_embedding": copy("visual.positional_embedding", config.tokens, w),
        **conv("patch_embedding", "visual.conv1", w, 3, config.patch_size, bias=False),
        **norm("pre_layernorm", "visual.ln_pre", w),
        **_blocks(config, "visual.transformer.resblocks."),
        **norm("post_layernorm", "visual.ln_post", w),
    }
    kept = Selection(tensors, lambda n: n.startswith("visual.") and n not in OTHERS)
    return convert("clip_vision", kept, table, clip.vision_target(config), **options)


def _blocks(c: CLIPTextConfig | CLIPVisionConfig, prefix: str) -> Table:
    w, m = c.hidden_size, c.intermediate_size

    def block(n: int) -> Table:
        b = f"{prefix}{n}"
        t = norm("layer_norm1", f"{b}.ln_1", w) | norm("layer_norm2", f"{b}.ln_2", w)
        for i, name in enumerate("qkv"):
            rows = (0, i * w, (i + 1) * w)
            t[f"{name}_proj/kernel"] = Leaf((Part(f"{b}.attn.in_proj_weight", (3 * w, w), *rows),), (1, 0))
            t[f"{name}_proj/bias"] = Leaf((Part(f"{b}.attn.in_proj_bias", (3 * w,), *rows),))
        t |= linear("out_proj", f"{b}.attn.out_proj", out=w, in_=w)
        return t | linear("fc1", f"{b}.mlp.c_fc", out=m, in_=w) | linear("fc2", f"{b}.mlp.c_proj", out=w, in_=m)

    return stack("blocks", [block(n) for n in range(c.num_hidden_layers)])


@dataclass(frozen=True)
class ProjectionConfig:
    """Sizes of the matrix that takes a picture's pooled state to the space that CLIP compares pictures and texts in."""

    width: int
    projection_dim: int

    def __post_init__(self):
        schema.check(self)


def projection_params(tensors: Mapping[str, Any], config: ProjectionConfig, **options: Any) -> dict[str, Any]:
    """`kernel` `[width, projection_dim]` from a CLIP of either naming; `options` are those of `engine.convert`."""
    return _projection("clip_projection", PROJECTIONS, tensors, config, options)


def text_projection_params(tensors: Mapping[str, Any], config: ProjectionConfig, **options: Any) -> dict[str, Any]:
    """The same of the text tower."""
    return _projection("text_projection", TEXT_PROJECTIONS, tensors, config, options)


def projection_config(
    shapes: Mapping[str, tuple[int, ...]], names: tuple[str, str] = PROJECTIONS
) -> ProjectionConfig | None:
    """Of a file that has one; `names`: what it is called by transformers and by OpenAI."""
    name = next((n for n in names if n in shapes and len(shapes[n]) == 2), None)
    if name is None:
        return None
    out, width = shapes[name] if name == names[0] else shapes[name][::-1]
    return _read("clip_projection", lambda: ProjectionConfig(width, out))


def _projection(
    component: str,
    names: tuple[str, str],
    tensors: Mapping[str, Any],
    config: ProjectionConfig,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    name = names[0] if names[0] in tensors else names[1]
    size = (config.width, config.projection_dim)
    leaf = Leaf((Part(name, size[::-1]),), (1, 0)) if name == names[0] else copy(name, *size)
    target = {"kernel": jax.ShapeDtypeStruct(size, np.float32)}
    return convert(component, Selection(tensors, lambda n: n == name), {"kernel": leaf}, target, **options)
