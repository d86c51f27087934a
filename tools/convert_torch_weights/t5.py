"""T5 encoder: from transformers' `T5EncoderModel`, or from a whole T5, whose decoder is left out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax

from dynaip_jax.errors import UserError, reason
from dynaip_jax.models.t5 import T5Config, T5Encoder
from tools.convert_torch_weights.engine import Table, abstract_params, convert, copy, linear, numbered, stack
from tools.convert_torch_weights.selection import Renamed, Selection

EMBEDDING, TIED = "shared.weight", "encoder.embed_tokens.weight"  # the same table: files have either or both
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


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

    return {
        "shared/embedding": copy(embedding, c.vocab_size, w),
        "relative_attention_bias": copy(BIAS, c.relative_attention_num_buckets, c.num_heads),
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


@lru_cache(maxsize=8)
def target(config: T5Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter of `T5Encoder(config)`."""
    return abstract_params(T5Encoder(config).init, *T5Encoder.inputs_spec(config).values())


LLAMA = {  # llama.cpp's names -> transformers'
    "token_embd.weight": EMBEDDING,
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
    **{f"attn_{x}.weight": f"layer.0.SelfAttention.{x}.weight" for x in "qkvo"},
    "attn_rel_b.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "attn_norm.weight": "layer.0.layer_norm.weight",
    "ffn_gate.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn_up.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn_down.weight": "layer.1.DenseReluDense.wo.weight",
    "ffn_norm.weight": "layer.1.layer_norm.weight",
}


def from_llama(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """`tensors` in llama.cpp's names under those of transformers; names that are not its stay as they are."""
    if "enc.blk.0.attn_q.weight" not in tensors:
        return tensors
    names = {}
    for name in tensors:
        if name.startswith("dec."):
            continue
        block, _, rest = name.removeprefix("enc.blk.").partition(".") if name.startswith("enc.blk.") else ("", "", name)
        new = LLAMA.get(rest, rest)
        names[f"encoder.block.{block}.{new}" if block else new] = name
    return Renamed(tensors, names)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> T5Config:
    """`T5Config` of a file without a config, read off its tensor shapes; T5's own 128 as the farthest distance, which leaves no trace.

    Raises `UserError` if a tensor needed for this is missing or the sizes do not fit each other.
    """
    try:
        words, width = shapes[EMBEDDING if EMBEDDING in shapes else TIED]
        buckets, heads = shapes[BIAS]
        return T5Config(
            vocab_size=words,
            d_model=width,
            d_kv=shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
            d_ff=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
            num_heads=heads,
            num_layers=numbered(shapes, "encoder.block."),
            relative_attention_num_buckets=buckets,
        )
    except KeyError as e:
        raise UserError(f"t5: tensor {e.args[0]} is missing; expected a whole T5 v1.1 encoder; use another file") from e
    except (ValueError, IndexError, ArithmeticError) as e:
        raise UserError(f"t5: shapes do not fit T5 v1.1 ({reason(e)}); expected such as t5xxl_fp16.safetensors") from e
