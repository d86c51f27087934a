"""T5 encoder: from transformers' `T5EncoderModel`, or from a whole T5, whose decoder is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from dynaip_jax.models.t5 import T5Config, T5Encoder
from tools.convert_torch_weights.engine import Table, abstract_params, convert, copy, linear, stack
from tools.convert_torch_weights.selection import Selection

EMBEDDING, TIED = "shared.weight", "encoder.embed_tokens.weight"  # the same table: files have either or both


def table(c: T5Config, embedding: str = EMBEDDING) -> Table:
    """Every leaf of `T5Encoder(c)` and the source tensor it is made of; `embedding` names the vocabulary's."""
    w, inner = c.d_model, c.num_heads * c.d_kv

    def block(n: int) -> Table:
        attn, mlp = (f"encoder.block.{n}.layer.{i}" for i in (0, 1))
        norms = (("attn_norm", attn), ("mlp_norm", mlp))
        t: Table = {f"{path}/scale": copy(f"{name}.layer_norm.weight", w) for path, name in norms}
        for name in "qkv":
            t |= linear(name, f"{attn}.SelfAttention.{name}", out=inner, in_=w, bias=False)
        t |= linear("o", f"{attn}.SelfAttention.o", out=w, in_=inner, bias=False)
        for name in ("wi_0", "wi_1"):
            t |= linear(name, f"{mlp}.DenseReluDense.{name}", out=c.d_ff, in_=w, bias=False)
        return t | linear("wo", f"{mlp}.DenseReluDense.wo", out=w, in_=c.d_ff, bias=False)

    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {
        "shared/embedding": copy(embedding, c.vocab_size, w),
        "relative_attention_bias": copy(bias, c.relative_attention_num_buckets, c.num_heads),
        **stack("blocks", [block(n) for n in range(c.num_layers)]),
        "final_norm/scale": copy("encoder.final_layer_norm.weight", w),
    }


def params_from_torch(tensors: Mapping[str, Any], config: T5Config, **options) -> dict[str, Any]:
    """Parameters of `T5Encoder(config)` from `tensors` (name -> array), as transformers 4 and 5 save them.

    Left out on purpose: the second copy of the embedding, the decoder and its head. `options` are those of
    `engine.convert`. Raises `UserError` listing names that are missing, unexpected or of the wrong shape, and tensors
    that are not finite.
    """
    embedding = TIED if TIED in tensors and EMBEDDING not in tensors else EMBEDDING
    left_out = ("decoder.", "lm_head.")
    kept = Selection(tensors, lambda n: not n.startswith(left_out) and (n != TIED or n == embedding))
    return convert("t5", kept, table(config, embedding), target(config), **options)


def target(config: T5Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of `T5Encoder(config)`."""
    return abstract_params(T5Encoder(config).init, *T5Encoder.inputs_spec(config).values())
