"""Public names of FLUX.1's weights: BFL's, diffusers', and those of the trainers of LoRAs.

Sources: black-forest-labs/flux `layers.py`, diffusers `lora_conversion_utils.py`, kohya sd-scripts `networks/lora_flux.py`, XLabs-AI
x-flux `layers.py` (processors), OneTrainer's OMI names.
"""

from __future__ import annotations

from dynaip_jax.models.clip import CLIPTextConfig
from dynaip_jax.models.flux import FluxConfig
from dynaip_jax.models.t5 import T5Config
from dynaip_jax.public_names import Names, Prefix, PublicNames

STREAMS = (  # ours and BFL's; XLabs' number; diffusers' modulation, q k v, their norms, projection, MLP
    ("img", 1, "norm1", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
    ("txt", 2, "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out", "ff_context"),
)  # fmt: skip
PREFIXES = (
    Prefix("lora_unet_", "transformer", flat=True),
    Prefix("lora_transformer_", "transformer", flat=True),
    Prefix("lycoris_", "transformer", flat=True),
    Prefix("lora_te1_", "clip_text", flat=True),
    Prefix("lora_te_", "clip_text", flat=True),
    Prefix("lora_te3_", "t5", flat=True),
    Prefix("lora_te2_", "t5", flat=True),  # OneTrainer's
    Prefix("text_encoders.clip_l.transformer.", "clip_text"),
    Prefix("text_encoders.t5xxl.transformer.", "t5"),
    Prefix("text_encoder_2.", "t5"),
    Prefix("text_encoder.", "clip_text"),
    Prefix("clip_l.", "clip_text"),
    Prefix("t5xxl.", "t5"),
    Prefix("t5.", "t5"),
    Prefix("base_model.model.transformer.", "transformer"),
    Prefix("base_model.model.text_encoder.", "clip_text"),
    Prefix("base_model.model.", "transformer"),
    Prefix("base_model.model.", "clip_text"),
    Prefix("base_model.model.", "t5"),
    Prefix("model.diffusion_model.", "transformer"),
    Prefix("diffusion_model.", "transformer"),
    Prefix("transformer.", "transformer"),
    Prefix("", "transformer"),
)
OTHERS = (
    (r"(lora_unet_|unet\.)(input_blocks|output_blocks|middle_block|down_blocks|up_blocks|mid_block)", "Stable Diffusion or SDXL"),
    (r"joint_(transformer_)?blocks", "Stable Diffusion 3"),
    (r"(double_stream|single_stream)_modulation", "FLUX.2"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"individual_token_refiner", "HunyuanVideo"),
    (r"transformer_blocks[._]\d+[._](img_mlp|txt_mlp|img_mod|txt_mod)", "Qwen-Image"),
    (r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)", "Wan"),
    (r"redux_up|redux_down", "FLUX.1 Redux"),
    (r"controlnet|input_hint_block", "a ControlNet"),
    (r"ip_adapter|to_k_ip|image_proj", "an image-prompt adapter, which is for `adapter`"),
)  # fmt: skip


def public_names(transformer: FluxConfig, clip_text: CLIPTextConfig, t5: T5Config) -> PublicNames:
    """The names of FLUX.1 with its text encoders at these sizes."""
    components = dict(transformer=_transformer(transformer), clip_text=_clip_text(clip_text), t5=_t5(t5))
    headers = dict(transformer="transformer", clip_text="text_encoder", t5="text_encoder_2")
    wider = "a control LoRA, which reads a control picture beside the noise"
    return PublicNames("FLUX.1", components, PREFIXES, headers, OTHERS, dict(img_in=wider, x_embedder=wider))


def _transformer(c: FluxConfig) -> Names:
    names, w = Names(), c.hidden_size
    for ours, theirs, in_ in (
        ("img_in", "x_embedder", c.in_channels),
        ("txt_in", "context_embedder", c.context_in_dim),
    ):
        names.linear(ours, {ours: w}, in_)
        names.alias(theirs, ours)
    guidance = [("guidance_in", "guidance_embedder", 256)] if c.guidance_embed else []
    for ours, theirs, in_ in (
        ("time_in", "timestep_embedder", 256),
        ("vector_in", "text_embedder", c.vec_in_dim),
        *guidance,
    ):
        for layer, number, width in (("in_layer", 1, in_), ("out_layer", 2, w)):
            names.linear(f"{ours}.{layer}", {f"{ours}/{layer}": w}, width)
            names.alias(f"time_text_embed.{theirs}.linear_{number}", f"{ours}.{layer}")
    for n in range(c.depth):
        _double(names, c, n)
    for n in range(c.depth_single_blocks):
        _single(names, c, n)
    names.linear("final_layer.linear", {"final_linear": c.out_channels}, w)
    names.alias("proj_out", "final_layer.linear")
    last = "final_layer.adaLN_modulation.1"
    names.linear(last, {"final_modulation/lin": 2 * w}, w)
    names.alias("norm_out.linear", last, (w, 2 * w), (0, w))  # diffusers has scale before shift
    return names


def _double(names: Names, c: FluxConfig, n: int) -> None:
    w, m, b, d, ours = c.hidden_size, c.mlp_dim, f"double_blocks.{n}", f"transformer_blocks.{n}", "double_blocks"
    for s, number, modulation, qkv, norms, out, ff in STREAMS:
        for name, leaf, rows, columns, theirs in (
            (f"{s}_mod.lin", f"{s}_mod/lin", 6 * w, w, f"{modulation}.linear"),
            (f"{s}_attn.proj", f"{s}_attn_proj", w, w, f"attn.{out}"),
            (f"{s}_mlp.0", f"{s}_mlp/in_layer", m, w, f"{ff}.net.0.proj"),
            (f"{s}_mlp.2", f"{s}_mlp/out_layer", w, m, f"{ff}.net.2"),
        ):
            names.linear(f"{b}.{name}", {f"{ours}/{leaf}": rows}, columns, block=n)
            names.alias(f"{d}.{theirs}", f"{b}.{name}")
        joint = f"{b}.{s}_attn.qkv"
        names.linear(joint, {f"{ours}/{s}_attn/qkv": 3 * w}, w, block=n, bias=c.qkv_bias)
        for j, theirs in enumerate(qkv):
            for name in (f"{d}.attn.{theirs}", f"{joint}.{j}"):
                names.alias(name, joint, (j * w, j * w + w))
        names.alias(f"{b}.processor.qkv_lora{number}", joint)
        names.alias(f"{b}.processor.proj_lora{number}", f"{b}.{s}_attn.proj")
        for kind, theirs in zip(("query_norm", "key_norm"), norms, strict=True):
            _scale(names, f"{b}.{s}_attn.norm.{kind}", f"{ours}/{s}_attn/{kind}", c.head_dim, n, f"{d}.attn.{theirs}")


def _single(names: Names, c: FluxConfig, n: int) -> None:
    w, m, b, d, ours = c.hidden_size, c.mlp_dim, f"single_blocks.{n}", f"single_transformer_blocks.{n}", "single_blocks"
    names.linear(f"{b}.modulation.lin", {f"{ours}/modulation/lin": 3 * w}, w, block=n)
    names.alias(f"{d}.norm.linear", f"{b}.modulation.lin")
    names.linear(f"{b}.linear1", {f"{ours}/attn/qkv": 3 * w, f"{ours}/mlp_in": m}, w, block=n)
    for j, theirs in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
        for name in (f"{d}.{theirs}", f"{b}.linear1.{j}"):
            names.alias(name, f"{b}.linear1", (j * w, j * w + (m if j == 3 else w)))
    names.linear(f"{b}.linear2", {f"{ours}/attn_out": w, f"{ours}/mlp_out": m}, w, block=n, columns=True)
    names.alias(f"{d}.proj_out", f"{b}.linear2")
    names.alias(f"{b}.processor.qkv_lora", f"{b}.linear1", (0, 3 * w))
    names.alias(f"{b}.processor.proj_lora", f"{b}.linear2")
    for kind, theirs in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
        _scale(names, f"{b}.norm.{kind}", f"{ours}/attn/{kind}", c.head_dim, n, f"{d}.attn.{theirs}")


def _scale(names: Names, name: str, leaf: str, width: int, block: int, theirs: str) -> None:
    """The scale of q's or k's norm, which BFL's files call NAME.scale."""
    names.norm(name, leaf, width, block=block)
    names.alias(f"{name}.scale", name)
    names.alias(theirs, name)


def _clip_text(c: CLIPTextConfig) -> Names:
    names, w, m = Names(), c.hidden_size, c.intermediate_size
    for n in range(c.num_hidden_layers):
        b = f"text_model.encoder.layers.{n}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names.linear(f"{b}.self_attn.{name}", {f"blocks/{name}": w}, w, block=n)
        names.linear(f"{b}.mlp.fc1", {"blocks/fc1": m}, w, block=n)
        names.linear(f"{b}.mlp.fc2", {"blocks/fc2": w}, m, block=n)
        for norm in ("layer_norm1", "layer_norm2"):
            names.norm(f"{b}.{norm}", f"blocks/{norm}", w, block=n, bias=True)
    for kind, leaf, rows in (
        ("token", "token_embedding/embedding", c.vocab_size),
        ("position", "position_embedding", c.max_position_embeddings),
    ):
        names.table(f"text_model.embeddings.{kind}_embedding", leaf, rows, w)
    names.norm("text_model.final_layer_norm", "final_layer_norm", w, bias=True)
    for name in list(names.modules):
        names.alias(name.removeprefix("text_model."), name)  # as transformers 5 has it
    return names


def _t5(c: T5Config) -> Names:
    names, w, inner = Names(), c.d_model, c.num_heads * c.d_kv
    for n in range(c.num_layers):
        attn, mlp = (f"encoder.block.{n}.layer.{i}" for i in (0, 1))
        for name in "qkv":
            names.linear(f"{attn}.SelfAttention.{name}", {f"blocks/{name}": inner}, w, block=n, bias=False)
        names.linear(f"{attn}.SelfAttention.o", {"blocks/o": w}, inner, block=n, bias=False)
        for name in ("wi_0", "wi_1"):
            names.linear(f"{mlp}.DenseReluDense.{name}", {f"blocks/{name}": c.d_ff}, w, block=n, bias=False)
        names.linear(f"{mlp}.DenseReluDense.wo", {"blocks/wo": w}, c.d_ff, block=n, bias=False)
        names.norm(f"{attn}.layer_norm", "blocks/attn_norm", w, block=n)
        names.norm(f"{mlp}.layer_norm", "blocks/mlp_norm", w, block=n)
    names.norm("encoder.final_layer_norm", "final_norm", w)
    names.table("shared", "shared/embedding", c.vocab_size, w)
    names.alias("encoder.embed_tokens", "shared")
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    names.table(bias, "relative_attention_bias", c.relative_attention_num_buckets, c.num_heads)
    return names
