"""Qwen3 as a text encoder: from transformers' `Qwen3ForCausalLM` or `Qwen3Model`, up to the last state that is used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax

from dynaip_jax.models.qwen3 import Qwen3, Qwen3Config
from tools.convert_torch_weights.engine import Table, abstract_params, convert, copy, linear, stack
from tools.convert_torch_weights.selection import Selection

PREFIX = "model."  # of all but the head in Qwen3ForCausalLM; Qwen3Model saves the names without it
BLOCK = re.compile(r"(?:model\.)?layers\.(\d+)\.")
AFTER = ("lm_head.", "model.norm.", "norm.")


def table(c: Qwen3Config) -> Table:
    """Every leaf of `Qwen3(c)` and the source tensor it is made of."""
    w, m, d = c.hidden_size, c.intermediate_size, c.head_dim
    heads = dict(q=c.num_attention_heads * d, k=c.num_key_value_heads * d, v=c.num_key_value_heads * d)

    def block(n: int) -> Table:
        attn, mlp = f"layers.{n}.self_attn", f"layers.{n}.mlp"
        t: Table = {
            "attn_norm/scale": copy(f"layers.{n}.input_layernorm.weight", w),
            "mlp_norm/scale": copy(f"layers.{n}.post_attention_layernorm.weight", w),
            "q_norm/scale": copy(f"{attn}.q_norm.weight", d),
            "k_norm/scale": copy(f"{attn}.k_norm.weight", d),
        }
        for name, out in heads.items():
            t |= linear(name, f"{attn}.{name}_proj", out=out, in_=w, bias=False)
        t |= linear("o", f"{attn}.o_proj", out=w, in_=heads["q"], bias=False)
        for name in ("gate", "up"):
            t |= linear(name, f"{mlp}.{name}_proj", out=m, in_=w, bias=False)
        return t | linear("down", f"{mlp}.down_proj", out=w, in_=m, bias=False)

    return {
        "embed_tokens/embedding": copy("embed_tokens.weight", c.vocab_size, w),
        **stack("blocks", [block(n) for n in range(c.blocks)]),
    }


def params_from_torch(tensors: Mapping[str, Any], config: Qwen3Config, **options) -> dict[str, Any]:
    """Parameters of `Qwen3(config)` from `tensors` (name -> array).

    Left out on purpose: blocks after the last state that is used, the last norm, the head. `options` are those of `engine.convert`.
    Raises `UserError` listing names that are missing, unexpected or of the wrong shape, and tensors that are not finite.
    """

    def used(name: str) -> bool:
        block = BLOCK.match(name)
        return int(block[1]) < config.blocks if block else not name.startswith(AFTER)

    return convert("qwen3", Selection(tensors, used, PREFIX), table(config), target(config), **options)


def target(config: Qwen3Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of `Qwen3(config)`."""
    return abstract_params(Qwen3(config).init, *Qwen3.inputs_spec(config).values())
