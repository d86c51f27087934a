"""Folders as diffusers and transformers write them: every part real, small and randomly initialised."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CLIP_SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
T5_PIECES = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,."]


def clip_vocabulary() -> dict[str, int]:
    """Byte-level BPE with the word-end forms, as CLIP's; no merges."""
    alphabet = sorted(ByteLevel.alphabet())
    return {t: i for i, t in enumerate([*alphabet, *(a + "</w>" for a in alphabet), *CLIP_SPECIAL])}


def flux_pipeline(guidance: bool) -> FluxPipeline:
    """A FluxPipeline like FLUX.1-dev's (`guidance`) or -schnell's, every weight random, norms included."""
    torch.manual_seed(3)
    vocab = clip_vocabulary()
    sizes = dict(bos_token_id=vocab["<|startoftext|>"], eos_token_id=vocab["<|endoftext|>"])
    clip = CLIPTextConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, vocab_size=len(vocab), **sizes
    )
    t5 = T5Config(
        vocab_size=len(T5_PIECES),
        d_model=20,
        d_kv=8,
        d_ff=40,
        num_heads=2,
        num_layers=2,
        feed_forward_proj="gated-gelu",
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance,
    )
    with torch.no_grad():
        for p in transformer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=guidance,
        shift=3.0 if guidance else 1.0,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=T5TokenizerFast(
            vocab=[(p, -float(i)) for i, p in enumerate(T5_PIECES)], extra_ids=0, model_max_length=512
        ),
        transformer=transformer.eval(),
    )


def save_clip_vision(path: Path, width: int = 32) -> None:
    """A transformers CLIP vision folder."""
    torch.manual_seed(4)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(path)
