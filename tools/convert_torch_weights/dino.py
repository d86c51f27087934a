"""DINO and DINOv2: from transformers' `ViTModel` and `Dinov2Model`, as their files name tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax

from dynaip_jax.models.dino import Dino, DinoConfig
from tools.convert_torch_weights.engine import Table, abstract_params, conv, convert, copy, linear, norm, stack
from tools.convert_torch_weights.selection import Selection, unprefixed

PREFIXES = ("vit.", "dinov2.")  # of models with a head
LEFT = ("pooler.", "classifier.", "embeddings.mask_token")  # unused by the features that are measured with


def table(c: DinoConfig) -> Table:
    """Every leaf of `Dino(c)` and the source tensor it is made of."""
    w, m = c.hidden_size, c.intermediate_size
    names = ("norm1", "norm2", "mlp.fc1", "mlp.fc2") if c.layer_scale else (
        "layernorm_before", "layernorm_after", "intermediate.dense", "output.dense",
    )  # fmt: skip

    def block(n: int) -> Table:
        b = f"encoder.layer.{n}"
        t = norm("norm1", f"{b}.{names[0]}", w) | norm("norm2", f"{b}.{names[1]}", w)
        for name in ("query", "key", "value"):
            t |= linear(name, f"{b}.attention.attention.{name}", out=w, in_=w)
        t |= linear("out", f"{b}.attention.output.dense", out=w, in_=w)
        t |= linear("fc1", f"{b}.{names[2]}", out=m, in_=w) | linear("fc2", f"{b}.{names[3]}", out=w, in_=m)
        if c.layer_scale:
            t |= {f"scale{k}": copy(f"{b}.layer_scale{k}.lambda1", w) for k in (1, 2)}
        return t

    return {
        "class_embedding": copy("embeddings.cls_token", 1, 1, w),
        "position_embedding": copy("embeddings.position_embeddings", 1, 1 + c.grid**2, w),
        **conv("patch_embedding", "embeddings.patch_embeddings.projection", w, 3, c.patch_size),
        **stack("blocks", [block(n) for n in range(c.num_hidden_layers)]),
        **norm("norm", "layernorm", w),
    }


def params_from_torch(tensors: Mapping[str, Any], config: DinoConfig, **options: Any) -> dict[str, Any]:
    """Parameters of `Dino(config)` from `tensors` (name -> array).

    Left out on purpose: a pooler, a classifier, the mask token. `options` are those of `engine.convert`. Raises `UserError` listing names
    that are missing, unexpected or of the wrong shape, and tensors that are not finite.
    """
    kept = Selection(unprefixed(tensors, PREFIXES), lambda name: not name.startswith(LEFT))
    return convert("dino", kept, table(config), target(config), **options)


@lru_cache(maxsize=8)
def target(config: DinoConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of `Dino(config)`."""
    return abstract_params(Dino(config).init, *Dino.inputs_spec(config).values())
