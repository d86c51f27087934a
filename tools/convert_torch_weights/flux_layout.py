"""How FLUX.1's checkpoints lie on disk: diffusers' `FluxPipeline` and BFL's single files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynaip_jax import reading
from dynaip_jax.errors import UserError, reason
from dynaip_jax.flow import ScheduleConfig
from dynaip_jax.storage.codec import from_dict, to_dict
from tools.convert_torch_weights import clip, flux, t5, vae
from tools.convert_torch_weights.sources import Folder, Layout, Sources, read_json

SCHEDULER = dict(  # field of `ScheduleConfig` -> of diffusers' scheduler_config.json
    dynamic="use_dynamic_shifting",
    base_tokens="base_image_seq_len",
    max_tokens="max_image_seq_len",
    base_shift="base_shift",
    max_shift="max_shift",
    shift="shift",
)


def single(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Any]:
    """The transformer or the autoencoder, by the names of tensors."""
    is_vae = any(name.startswith(("encoder.", "decoder.")) for name in shapes)
    return ("vae", vae) if is_vae else ("transformer", flux)


def manifest(sources: Sources, t5_length: int | None) -> dict[str, Any]:
    """Schedule, text lengths and defaults: dev's where guidance is an input, otherwise schnell's."""
    transformer = sources.components.get("transformer")
    guided = transformer is None or transformer.config.guidance_embed
    autoencoder = sources.components.get("vae")
    side = 128 * (autoencoder.config.downsample if autoencoder else 8)
    return dict(
        schedule=to_dict(_schedule(sources.scheduler, guided)),
        text=dict(t5_length=t5_length or (512 if guided else 256), clip_length=_clip_length(sources)),
        defaults=dict(steps=28 if guided else 4, guidance=3.5 if guided else None, height=side, width=side),
    )


def _schedule(scheduler: dict[str, Any] | None, guided: bool) -> ScheduleConfig:
    if scheduler is None:
        return ScheduleConfig(dynamic=guided)
    given = {ours: scheduler.get(theirs) for ours, theirs in SCHEDULER.items()}
    try:
        return from_dict(ScheduleConfig, {name: value for name, value in given.items() if value is not None})
    except (TypeError, ValueError) as e:
        raise UserError(f"scheduler/scheduler_config.json: {reason(e)}; expected FLUX.1's; download it again") from e


def _clip_length(sources: Sources) -> int:
    if "clip_text" not in sources.components:
        return 77
    length = sources.components["clip_text"].config.max_position_embeddings
    config = sources.tokenizers["clip"] / "tokenizer_config.json"
    if not reading.is_file(config):
        return length
    longest = read_json(config).get("model_max_length") or length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
        raise UserError(f"{config}: model_max_length {longest!r}: expected a number of tokens; download it again")
    return int(min(length, longest))


WEIGHTS = "diffusion_pytorch_model"
LAYOUT = Layout(
    family="flux",
    pipelines=("FluxPipeline",),
    folders=dict(
        transformer=Folder("transformer", flux.config_from_diffusers, flux.params_from_torch, WEIGHTS),
        vae=Folder("vae", vae.config_from_diffusers, vae.params_from_torch, WEIGHTS),
        t5=Folder("text_encoder_2", t5.T5Config.from_hf, t5.params_from_torch, "model"),
        clip_text=Folder("text_encoder", clip.CLIPTextConfig.from_hf, clip.text_params_from_torch, "model"),
    ),
    tokenizers=dict(clip="tokenizer", t5="tokenizer_2"),
    own=lambda shapes: False,  # what no other family has for its own is taken for this one's
    single=single,
    manifest=manifest,
)
