"""FLUX.1 bundles as diffusers folders and as BFL's single files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynaip_jax.errors import UserError
from dynaip_jax.flow import ScheduleConfig
from dynaip_jax.models.clip import CLIPTextConfig
from dynaip_jax.models.flux import FluxConfig
from dynaip_jax.models.t5 import T5Config
from dynaip_jax.models.vae import NORM_GROUPS, VAEConfig
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.storage.codec import from_dict
from dynaip_jax.storage.folders import copy_tree
from tools.convert_torch_weights import back, clip, flux, t5, vae

BFL_FILES = dict(transformer="flux1.safetensors", vae="ae.safetensors")
MARKS = ("model_index.json", *BFL_FILES.values())
CLASSES = dict(
    transformer=("transformer", "diffusers", "FluxTransformer2DModel"), vae=("vae", "diffusers", "AutoencoderKL"),
    t5=("text_encoder_2", "transformers", "T5EncoderModel"), clip_text=("text_encoder", "transformers", "CLIPTextModel"),
)  # fmt: skip
WEIGHTS = dict(transformer="diffusion_pytorch_model", vae="diffusion_pytorch_model", t5="model", clip_text="model")
TOKENIZERS = dict(clip=("tokenizer", "CLIPTokenizer"), t5=("tokenizer_2", "T5TokenizerFast"))


def write(bundle: Bundle, to: str, folder: Path, say: Callable[[str], object]) -> None:
    """Writes what `bundle` has as `to`, "bfl" or "diffusers", into `folder`; tells `say` of each component.

    Raises `UserError` for a bundle that lacks the transformer, or whose sizes the public layout cannot say.
    """
    if "transformer" not in bundle.manifest["components"]:
        raise UserError(f"`source` {bundle.path}: has no transformer; expected a bundle of FLUX.1; pass another")
    _bfl(bundle, folder, say) if to == "bfl" else _diffusers(bundle, folder, say)


def _bfl(bundle: Bundle, folder: Path, say: Callable[[str], object]) -> None:
    for name, file in BFL_FILES.items():
        if name in bundle.manifest["components"]:
            config: Any = bundle.config(name, dict(transformer=FluxConfig, vae=VAEConfig)[name])
            table = flux.table(config, "bfl") if name == "transformer" else vae.table(config, "bfl")
            back.write(bundle, name, table, folder / file)
            say(f"{name}: {file}")


def _diffusers(bundle: Bundle, folder: Path, say: Callable[[str], object]) -> None:
    index: dict[str, Any] = dict(_class_name="FluxPipeline", _diffusers_version="0.32.0")
    readers: dict[str, Any] = dict(
        transformer=(FluxConfig, lambda c: flux.table(c, "diffusers"), _transformer),
        vae=(VAEConfig, lambda c: vae.table(c, "diffusers"), _autoencoder),
        t5=(T5Config, t5.table, _t5),
        clip_text=(CLIPTextConfig, lambda c: clip.text_table(c, clip.TEXT), _clip),
    )
    for name, (cls, table, described) in readers.items():
        if name not in bundle.manifest["components"]:
            continue
        config = bundle.config(name, cls)
        place, library, kind = CLASSES[name]
        back.write(bundle, name, table(config), folder / place / f"{WEIGHTS[name]}.safetensors")
        _write_json(folder / place / "config.json", described(config))
        index[place] = [library, kind]
        say(f"{name}: {place}/")
    for name, (place, kind) in TOKENIZERS.items():
        if (bundle.path / "tokenizers" / name).is_dir():
            copy_tree(bundle.path / "tokenizers" / name, folder / place)
            index[place] = ["transformers", kind]
    schedule = from_dict(ScheduleConfig, bundle.manifest["schedule"])
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(schedule))
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def _transformer(c: FluxConfig) -> dict[str, Any]:
    if c.mlp_ratio != 4 or not c.qkv_bias:
        raise UserError(
            f"transformer: mlp_ratio {c.mlp_ratio}, qkv_bias {c.qkv_bias}; diffusers' class has 4 and true alone; export it as bfl"
        )
    return dict(
        _class_name="FluxTransformer2DModel", patch_size=1, in_channels=c.in_channels, out_channels=c.out_channels, num_layers=c.depth,
        num_single_layers=c.depth_single_blocks, attention_head_dim=c.head_dim, num_attention_heads=c.num_heads,
        joint_attention_dim=c.context_in_dim, pooled_projection_dim=c.vec_in_dim, guidance_embeds=c.guidance_embed,
        axes_dims_rope=list(c.axes_dim),
    )  # fmt: skip


def _autoencoder(c: VAEConfig) -> dict[str, Any]:
    levels = len(c.widths)
    return dict(
        _class_name="AutoencoderKL", act_fn="silu", block_out_channels=list(c.widths), down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, in_channels=c.in_channels, out_channels=c.out_ch, latent_channels=c.z_channels,
        layers_per_block=c.num_res_blocks, norm_num_groups=NORM_GROUPS, sample_size=c.resolution, scaling_factor=c.scale_factor,
        shift_factor=c.shift_factor, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=True, force_upcast=True,
    )  # fmt: skip


def _t5(c: T5Config) -> dict[str, Any]:
    names = (
        "vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "relative_attention_num_buckets",
        "relative_attention_max_distance", "layer_norm_epsilon",
    )  # fmt: skip
    return dict(
        architectures=["T5EncoderModel"], model_type="t5", feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        tie_word_embeddings=False, **{name: getattr(c, name) for name in names},
    )  # fmt: skip


def _clip(c: CLIPTextConfig) -> dict[str, Any]:
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "vocab_size",
        "max_position_embeddings", "eos_token_id",
    )  # fmt: skip
    return dict(
        architectures=["CLIPTextModel"], model_type="clip_text_model", **{name: getattr(c, name) for name in names}
    )


def _scheduler(s: ScheduleConfig) -> dict[str, Any]:
    return dict(
        _class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, use_dynamic_shifting=s.dynamic, shift=s.shift,
        base_shift=s.base_shift, max_shift=s.max_shift, base_image_seq_len=s.base_tokens, max_image_seq_len=s.max_tokens,
    )  # fmt: skip
