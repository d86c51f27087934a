"""How FLUX.1's checkpoints lie on disk: diffusers' `FluxPipeline` and BFL's single files."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynaip_jax import reading
from dynaip_jax.errors import UserError, reason
from dynaip_jax.flow import ScheduleConfig
from dynaip_jax.storage.codec import from_dict, to_dict
from tools.convert_torch_weights import clip, clip_files, flux, flux_back, flux_known, t5, vae
from tools.convert_torch_weights.selection import Renamed, shapes_of, unprefixed
from tools.convert_torch_weights.sources import Folder, Layout, Source, Sources, read_json

SCHEDULER = dict(  # field of `ScheduleConfig` -> of diffusers' scheduler_config.json
    dynamic="use_dynamic_shifting",
    base_tokens="base_image_seq_len",
    max_tokens="max_image_seq_len",
    base_shift="base_shift",
    max_shift="max_shift",
    shift="shift",
)


PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "_orig_mod.",
    "module.",
    "model.",
    "vae.",
    "first_stage_model.",
    "transformer.",
)
CHECKPOINT = {  # prefixes in a file that holds a whole model, and the component behind each
    "text_encoders.t5xxl.transformer.": "t5",
    "text_encoders.clip_l.transformer.": "clip_text",
    "vae.": "vae",
    "first_stage_model.": "vae",
    "model.diffusion_model.": "transformer",
}
COMPANY = re.compile(
    r"text_encoders\.\w+\.(logit_scale|transformer\.text_projection\.weight|spiece_model)|.*position_ids"
)


def single(tensors: Mapping[str, Any], files: list[Path]) -> dict[str, Source]:
    """The components of a file, by the names of its tensors. Raises `UserError` for a file of another kind, by its name."""
    parts = _checkpoint(tensors) or {"": unprefixed(tensors, PREFIXES)}
    return {name: source for own in parts.values() for name, source in _component(own, files).items()}


def _checkpoint(tensors: Mapping[str, Any]) -> dict[str, Mapping[str, Any]] | None:
    """The components of a file that holds several, under their own names; None if it holds one."""
    found = {prefix for prefix in CHECKPOINT if any(name.startswith(prefix) for name in tensors)}
    if len(found) < 2:
        return None
    flux_known.refuse_others(shapes_of(tensors))
    left = [n for n in tensors if not n.startswith(tuple(found)) and not COMPANY.fullmatch(n)]
    if left:
        raise UserError(
            f"{len(left)} tensors belong to no component: {left[0][:60]}; expected {', '.join(CHECKPOINT)}; use another file"
        )
    parts: dict[str, Mapping[str, Any]] = {}
    if {"vae.", "first_stage_model."} <= found:
        raise UserError("two autoencoders, under vae. and first_stage_model.; expected one; use another file")
    for prefix in sorted(found):
        names = {n.removeprefix(prefix): n for n in tensors if n.startswith(prefix) and not COMPANY.fullmatch(n)}
        parts[CHECKPOINT[prefix]] = Renamed(tensors, names)
    return parts


def _component(tensors: Mapping[str, Any], files: list[Path]) -> dict[str, Source]:
    """The one that `tensors` are, whatever their naming."""
    tensors = t5.from_llama(tensors)
    shapes = shapes_of(tensors)
    flux_known.refuse_others(shapes)
    if any(n in shapes for n in (t5.BIAS, t5.EMBEDDING, t5.TIED)):
        return {"t5": Source(t5.config_from_shapes(shapes), tensors, files, t5.params_from_torch)}
    if any(n.endswith(clip_files.TEXT_MARK) for n in shapes):
        return {"clip_text": Source(clip_files.text_config(shapes), tensors, files, clip_files.text_params)}
    if any(n.startswith((clip.VISION, "visual.")) for n in shapes):
        raise UserError("this is a CLIP vision tower; expected a part of FLUX.1; pass it as `clip_vision`")
    if any(n.startswith(("encoder.", "decoder.")) for n in shapes):
        layout = vae.layout_of(shapes)
        return {"vae": Source(vae.config_from_shapes(shapes, layout), tensors, files, vae.params_from_torch)}
    layout = flux.layout_of(shapes)
    return {"transformer": Source(flux.config_from_shapes(shapes, layout), tensors, files, flux.params_from_torch)}


def manifest(sources: Sources, t5_length: int | None) -> dict[str, Any]:
    """Schedule, text lengths and defaults: dev's where guidance is an input, otherwise schnell's."""
    transformer = sources.components.get("transformer")
    if transformer is not None and transformer.config.in_channels != transformer.config.out_channels:
        print(
            f"note: the transformer takes {transformer.config.in_channels} channels (FLUX.1 Fill, Depth and Canny take pictures beside the "
            "noise); dynaip sample cannot draw with it",
            file=sys.stderr,
        )
    guided = transformer is None or transformer.config.guidance_embed
    autoencoder = sources.components.get("vae")
    side = 128 * (autoencoder.config.downsample if autoencoder else 8)
    return dict(
        schedule=to_dict(_schedule(sources.scheduler, guided)),
        text=dict(t5_length=t5_length or (512 if guided else 256), clip_length=_clip_length(sources)),
        defaults=dict(steps=28 if guided else 4, guidance=3.5 if guided else None, height=side, width=side),
    )


def _schedule(scheduler: dict[str, Any] | None, guided: bool) -> ScheduleConfig:
    """The schedule of a transformer that is `guided`, as the folder's scheduler has it if that is of the same kind."""
    if scheduler is None:
        return ScheduleConfig(dynamic=guided)
    given = {ours: scheduler.get(theirs) for ours, theirs in SCHEDULER.items()}
    try:
        schedule = from_dict(ScheduleConfig, {name: value for name, value in given.items() if value is not None})
    except (TypeError, ValueError) as e:
        raise UserError(f"scheduler/scheduler_config.json: {reason(e)}; expected FLUX.1's; download it again") from e
    if schedule.dynamic == guided:
        return schedule
    kind = "guided, as dev is," if guided else "not guided, as schnell,"
    print(
        f"note: the transformer is {kind} and the folder's scheduler is not of its kind; the bundle gets the transformer's own",
        file=sys.stderr,
    )
    return ScheduleConfig(dynamic=guided)


def _clip_length(sources: Sources) -> int:
    if "clip_text" not in sources.components:
        return 77
    length = sources.components["clip_text"].config.max_position_embeddings
    if "clip" not in sources.tokenizers:
        return min(length, 77)
    config = sources.tokenizers["clip"] / "tokenizer_config.json"
    if not reading.is_file(config):
        return length
    longest = read_json(config).get("model_max_length") or length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
        raise UserError(f"{config}: model_max_length {longest!r}: expected a number of tokens; download it again")
    return int(min(length, longest))


PIPELINES = tuple(
    f"Flux{kind}Pipeline"
    for kind in (
        "", "Img2Img", "Inpaint", "Control", "ControlImg2Img", "ControlInpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint",
        "Fill", "Kontext", "KontextInpaint",
    )
)  # fmt: skip
WEIGHTS = "diffusion_pytorch_model"
LAYOUT = Layout(
    family="flux",
    pipelines=PIPELINES,
    folders=dict(
        transformer=Folder(
            "transformer", flux.config_from_diffusers, flux.params_from_torch, WEIGHTS, ("FluxTransformer2DModel",)
        ),
        vae=Folder("vae", vae.config_from_diffusers, vae.params_from_torch, WEIGHTS, ("AutoencoderKL",)),
        t5=Folder("text_encoder_2", t5.T5Config.from_hf, t5.params_from_torch, "model", ("t5",)),
        clip_text=Folder(
            "text_encoder",
            clip.CLIPTextConfig.from_hf,
            clip.text_params_from_torch,
            "model",
            ("clip_text_model", "clip"),
        ),
    ),
    tokenizers=dict(clip="tokenizer", t5="tokenizer_2"),
    own=lambda shapes: False,  # what no other family has for its own is taken for this one's
    single=single,
    manifest=manifest,
    back=flux_back.write,
    marks=flux_back.MARKS,
)
