"""Folders as diffusers and transformers write them, of FLUX.2 [klein]'s kind: every part real, small and randomly initialised."""

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from dynaip_jax.testing import TEMPLATE, TURN

LAYERS = 28  # the last state that is read is the 27th
STRONGER = {  # parameters by parts of their names: sharp attention that counts, so that a few rows among 512 of text move the picture
    (".norm_q", ".norm_k", ".norm_added"): 3.0,
    (".to_out", ".to_add_out", "proj_out"): 2.0,
}


def klein_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE without merges, of Qwen's class, with a chat template that writes what Qwen3's writes."""
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", *TURN]
    tokenizer = Qwen2Tokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], pad_token="<|endoftext|>")
    tokenizer.add_special_tokens(dict(additional_special_tokens=list(TURN)))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def klein_pipeline(distilled: bool) -> Flux2KleinPipeline:
    """A pipeline like that of FLUX.2 [klein], every weight random, norms and statistics included."""
    torch.manual_seed(3)
    tokenizer = klein_tokenizer()
    qwen3 = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, rope_parameters=dict(rope_type="default", rope_theta=1e6),
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(32, 32, 32, 64), latent_channels=32, layers_per_block=1, sample_size=64
    )
    transformer = Flux2Transformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3, joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    text_encoder = Qwen3ForCausalLM(qwen3)
    with torch.no_grad():
        for p in (*transformer.parameters(), *text_encoder.parameters()):
            p.add_(0.05 * torch.randn_like(p))
        for names, factor in STRONGER.items():
            for name, p in transformer.named_parameters():
                p.mul_(factor if any(part in name for part in names) else 1.0)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        shift=3.0,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return Flux2KleinPipeline(
        scheduler=scheduler, vae=vae.eval(), text_encoder=text_encoder.eval(), tokenizer=tokenizer,
        transformer=transformer.eval(), is_distilled=distilled,
    )  # fmt: skip
