"""CLIP's towers: from transformers' `CLIPTextModel`, `CLIPVisionModel` (with projection or not) or a whole `CLIPModel`.

transformers 5 saves those two classes under bare names; the others, and all of version 4, carry `text_model.` and
`vision_model.`. Flax's own files (`flax_model.msgpack`) are read under torch's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dynaip_jax.errors import UserError
from dynaip_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from dynaip_jax.models.towers import TowerConfig
from tools.convert_torch_weights import flax_file
from tools.convert_torch_weights.engine import Table, abstract_params, conv, convert, copy, linear, norm, stack
from tools.convert_torch_weights.selection import Selection

TEXT, VISION = "text_model.", "vision_model."
HEADS = ("text_projection.weight", "visual_projection.weight", "logit_scale")
FLAX_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
FLAX_KERNEL_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}  # [in, out] -> [out, in]; [h, w, in, out] -> [out, in, h, w]


def text_table(c: CLIPTextConfig, prefix: str = "") -> Table:
    """Every leaf of `CLIPText(c)` and the source tensor it is made of, whose name starts with `prefix`."""
    w = c.hidden_size
    return {
        "token_embedding/embedding": copy(f"{prefix}embeddings.token_embedding.weight", c.vocab_size, w),
        "position_embedding": copy(f"{prefix}embeddings.position_embedding.weight", c.max_position_embeddings, w),
        **blocks(c, prefix),
        **norm("final_layer_norm", f"{prefix}final_layer_norm", w),
    }


def vision_table(c: CLIPVisionConfig, prefix: str = "") -> Table:
    """Every leaf of `CLIPVision(c)` and the source tensor it is made of, whose name starts with `prefix`."""
    w = c.hidden_size
    return {
        "class_embedding": copy(f"{prefix}embeddings.class_embedding", w),
        "position_embedding": copy(f"{prefix}embeddings.position_embedding.weight", c.tokens, w),
        **conv("patch_embedding", f"{prefix}embeddings.patch_embedding", w, 3, c.patch_size, bias=False),
        **norm("pre_layernorm", f"{prefix}pre_layrnorm", w),  # the misspelling is theirs
        **blocks(c, prefix),
        **norm("post_layernorm", f"{prefix}post_layernorm", w),
    }


def text_params_from_torch(tensors: Mapping[str, Any], config: CLIPTextConfig, **options) -> dict[str, Any]:
    """Parameters of `CLIPText(config)` from `tensors` (name -> array): see `vision_params_from_torch`."""
    kept, prefix = _tower(tensors, TEXT, VISION)
    return convert("clip_text", kept, text_table(config, prefix), text_target(config), **options)


def vision_params_from_torch(tensors: Mapping[str, Any], config: CLIPVisionConfig, **options) -> dict[str, Any]:
    """Parameters of `CLIPVision(config)` from `tensors` (name -> array), with or without transformers' tower prefix.

    Left out on purpose: the other tower, projections, the logit scale, and the `position_ids` of old files. `options`
    are those of `engine.convert`. Raises `UserError` listing names that are missing, unexpected or of the wrong shape,
    and tensors that are not finite.
    """
    kept, prefix = _tower(tensors, VISION, TEXT)
    return convert("clip_vision", kept, vision_table(config, prefix), vision_target(config), **options)


@lru_cache(maxsize=8)
def text_target(config: CLIPTextConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of `CLIPText(config)`."""
    return abstract_params(CLIPText(config).init, *CLIPText.inputs_spec(config).values())


@lru_cache(maxsize=8)
def vision_target(config: CLIPVisionConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of `CLIPVision(config)`."""
    init = partial(CLIPVision(config).init, layers=(0,))
    return abstract_params(init, *CLIPVision.inputs_spec(config).values())


def from_flax(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a `flax_model.msgpack` of transformers, under their torch names and in torch's layout.

    Source: transformers `modeling_flax_pytorch_utils`. Raises `UserError` for a missing, truncated or corrupt file, and for one of
    which two leaves would become one tensor.
    """
    tensors: dict[str, np.ndarray] = {}
    for (*module, leaf), x in flax_file.leaves(Path(path)).items():
        axes = FLAX_KERNEL_AXES.get(x.ndim) if leaf == "kernel" else None
        name = ".".join([*module, FLAX_LEAVES.get(leaf, leaf)])
        if name in tensors:
            raise UserError(f"{path}: two leaves are {name}; expected one; download or copy it again")
        tensors[name] = x if axes is None else x.transpose(axes)
    return tensors


def _tower(tensors: Mapping[str, Any], own: str, other: str) -> tuple[Selection, str]:
    """All but the known company of the tower of prefix `own`; and the prefix that its names have here."""
    prefix = own if any(n.startswith((own, other)) for n in tensors) else ""
    ids = f"{prefix}embeddings.position_ids"
    return Selection(tensors, lambda n: n not in HEADS and n != ids and not n.startswith(other)), prefix


def blocks(c: TowerConfig, prefix: str) -> Table:
    """The leaves of a tower's blocks, in transformers' names."""
    w, m = c.hidden_size, c.intermediate_size

    def block(n: int) -> Table:
        b = f"{prefix}encoder.layers.{n}"
        t = norm("layer_norm1", f"{b}.layer_norm1", w) | norm("layer_norm2", f"{b}.layer_norm2", w)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            t |= linear(name, f"{b}.self_attn.{name}", out=w, in_=w)
        return t | linear("fc1", f"{b}.mlp.fc1", out=m, in_=w) | linear("fc2", f"{b}.mlp.fc2", out=w, in_=m)

    return stack("blocks", [block(n) for n in range(c.num_hidden_layers)])
