"""Files that are told from FLUX.1's by the names of their tensors: other models, and what goes with FLUX.1 and is no part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dynaip_jax.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]


def _has(*parts: str) -> Callable[[Shapes], bool]:
    """Whether a name holds one of `parts`."""
    return lambda shapes: any(part in name for name in shapes for part in parts)


def _starts(*parts: str) -> Callable[[Shapes], bool]:
    return lambda shapes: any(name.startswith(parts) for name in shapes)


KNOWN: tuple[tuple[Callable[[Shapes], bool], str], ...] = (
    (_has("lora_down", "lora_up", "lora_A.", "lora_B.", "lora.down", "lora.up", "_lora1.", "_lora2.", "lokr_", "hada_w", "lora_linear_layer"), "a LoRA (dynaip sample takes it as --lora)"),
    (_has(".diff_b", ".dora_scale", "bundle_emb."), "a LoRA (dynaip sample takes it as --lora)"),
    (lambda s: bool(s) and all(name.endswith((".diff", ".diff_b", ".alpha", ".set_weight")) for name in s), "a LoRA of full differences (dynaip sample takes it as --lora)"),
    (_has("ip_adapter_double_stream", "ip_adapter_proj_model"), "an XLabs IP-Adapter (dynaip sample takes it as --adapter)"),
    (_starts("image_proj.", "ip_adapter."), "an IP-Adapter (dynaip sample takes InstantX's as --adapter)"),
    (_starts("pulid_"), "a PuLID adapter"),
    (_starts("redux_"), "FLUX.1 Redux"),
    (_has("controlnet_blocks", "controlnet_x_embedder", "input_hint_block", "controlnet_cond_embedding"), "a ControlNet for FLUX.1"),
    (_has("distilled_guidance_layer."), "Chroma"),
    (_has("double_stream_modulation_img", "single_stream_modulation."), "FLUX.2"),
    (_has("early_stream_modulations", "ref_time_in."), "FLUX.3"),
    (_has("individual_token_refiner"), "HunyuanVideo"),
    (_has("joint_blocks.", "x_embedder.proj."), "Stable Diffusion 3 or AuraFlow"),
    (_has("double_layers."), "AuraFlow"),
    (_has("transformer_blocks.0.img_mod.", "txt_norm.weight"), "Qwen-Image"),
    (_has("conditioner.embedders.", "label_emb."), "an SDXL checkpoint"),
    (_has("input_blocks.0.0.", "cond_stage_model.", "down_blocks.0.attentions.0.transformer_blocks"), "a Stable Diffusion checkpoint"),
    (_has("quant_conv."), "an autoencoder of Stable Diffusion or SDXL"),
    (_starts("encoder.layers.", "decoder.layers.", "taesd_"), "TAEF1, a small stand-in for the autoencoder"),
    (_has("DenseReluDense.wi.weight"), "T5 v1.0"),
    (_has("vision_model.head.probe", "vision_model.head.attention"), "a SigLIP vision tower (pass it as --clip-vision)"),
    (_has("model.layers.0.self_attn.q_proj", "model.language_model."), "a language model"),
)  # fmt: skip


def refuse_others(shapes: Shapes) -> None:
    """Raises `UserError`, by its name, for a file that is known to be something else."""
    for test, what in KNOWN:
        if test(shapes):
            raise UserError(
                f"this is {what}; expected a FLUX.1 transformer, its autoencoder, T5 v1.1 or CLIP; pass a file of one of these"
            )
    latent = shapes.get("decoder.conv_in.weight", (0, 16))
    if len(latent) > 1 and latent[1] == 32:
        raise UserError(
            "this is FLUX.2's autoencoder (32 latent channels); expected FLUX.1's of 16; pass ae.safetensors"
        )
