"""How FLUX.2 [klein]'s checkpoints lie on disk: diffusers' `Flux2KleinPipeline` and BFL's single files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynaip_jax.errors import UserError
from dynaip_jax.families import flux2 as family
from tools.convert_torch_weights import flux2, flux2_vae, qwen3
from tools.convert_torch_weights.sources import Folder, Layout, Sources, one_component, read_json

SCHEDULER = dict(  # of diffusers' scheduler_config.json: what its pipeline needs to shift times as BFL does
    use_dynamic_shifting=True, time_shift_type="exponential", shift_terminal=None, invert_sigmas=False,
    use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False, stochastic_sampling=False,
)  # fmt: skip


DEV = "FLUX.2 [dev], whose text encoder (Mistral Small) is not known here; expected FLUX.2 [klein]"
KV = "FLUX.2 [klein] 9B-KV, which reads reference pictures in a way of its own; expected [klein] or its base"


def own(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a single file is of FLUX.2."""
    return flux2_vae.is_flux2(shapes) or flux2.is_flux2(shapes)


def single(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Any]:
    """The transformer or the autoencoder, by the names of tensors."""
    return ("vae", flux2_vae) if flux2_vae.is_flux2(shapes) else ("transformer", flux2)


def manifest(sources: Sources, length: int | None) -> dict[str, Any]:
    """Text length and defaults: those of a distilled model where its folder says that it is one, otherwise of base."""
    _check_scheduler(sources.scheduler)
    transformer = sources.components.get("transformer")
    if transformer is not None and transformer.config.guidance_embed:
        raise UserError(f"transformer: {DEV}; use a checkpoint of another kind")
    return dict(
        schedule={}, text=dict(qwen3_length=length or family.LENGTH), defaults=family.defaults(_distilled(sources))
    )


def _distilled(sources: Sources) -> bool:
    """What `model_index.json` says beside the tokenizer; base without one."""
    if "qwen3" not in sources.tokenizers:
        return False
    index = sources.tokenizers["qwen3"].parent / "model_index.json"
    distilled = read_json(index).get("is_distilled", False)
    if not isinstance(distilled, bool):
        raise UserError(f"{index}: is_distilled {distilled!r}: expected true or false; download it again")
    return distilled


def _check_scheduler(scheduler: Mapping[str, Any] | None) -> None:
    for name, wanted in SCHEDULER.items():
        if scheduler is not None and scheduler.get(name, wanted) != wanted:
            raise UserError(
                f"scheduler/scheduler_config.json: {name} {scheduler[name]!r}; expected {wanted!r}, as FLUX.2 has it; download "
                "it again"
            )


WEIGHTS = "diffusion_pytorch_model"
LAYOUT = Layout(
    family="flux2",
    pipelines=("Flux2KleinPipeline",),
    folders=dict(
        transformer=Folder("transformer", flux2.config_from_diffusers, flux2.params_from_torch, WEIGHTS),
        vae=Folder("vae", flux2_vae.config_from_diffusers, flux2_vae.params_from_torch, WEIGHTS),
        qwen3=Folder("text_encoder", qwen3.Qwen3Config.from_hf, qwen3.params_from_torch, "model"),
    ),
    tokenizers=dict(qwen3="tokenizer"),
    own=own,
    single=one_component(single, ("model.diffusion_model.", "vae.")),
    manifest=manifest,
    refused=dict(Flux2Pipeline=DEV, Flux2KleinKVPipeline=KV),
)
