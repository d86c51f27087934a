"""FLUX.1: the transformer with T5 and CLIP text, its autoencoder, and CLIP vision for reference pictures."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dynaip_jax.errors import UserError
from dynaip_jax.families.base import Component, Matrices, Preset
from dynaip_jax.families.flux_names import public_names
from dynaip_jax.families.mmdit import MMDiT
from dynaip_jax.families.quantize import weights_model
from dynaip_jax.families.tokenizers import Tokenizers
from dynaip_jax.layers.packing import image_ids, pack_latents, unpack_latents
from dynaip_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from dynaip_jax.models.flux import Flux, FluxConfig
from dynaip_jax.models.t5 import T5Config, T5Encoder
from dynaip_jax.models.vae import VAE, VAEConfig
from dynaip_jax.public_names import PublicNames
from dynaip_jax.types import TextCondition


def published(guided: bool) -> Preset:
    """FLUX.1-dev (`guided`) or -schnell, with CLIP ViT-L/14 for reference pictures."""
    configs = dict(
        transformer=FluxConfig.dev() if guided else FluxConfig.schnell(),
        vae=VAEConfig.flux(),
        t5=T5Config.xxl(),
        clip_text=CLIPTextConfig.large(),
        clip_vision=CLIPVisionConfig.large(),
    )
    steps, tokens = (28, 512) if guided else (4, 256)
    text, defaults = dict(t5_length=tokens, clip_length=77), dict(steps=steps, guidance=3.5, height=1024, width=1024)
    return Preset(configs, dict(dynamic=guided), text, defaults)


class Flux1(MMDiT):
    """FLUX.1 at given sizes."""

    name = "flux"
    components = {
        "transformer": Component(FluxConfig, Flux),
        "vae": Component(VAEConfig, VAE),
        "t5": Component(T5Config, T5Encoder),
        "clip_text": Component(CLIPTextConfig, CLIPText),
        "clip_vision": Component(CLIPVisionConfig, CLIPVision, lambda c: dict(layers=(c.num_hidden_layers,))),
    }
    text_encoders = ("t5", "clip_text")
    matrices = (
        Matrices(r"blocks.*(attn_proj|attn_out).*kernel", (1, 2), (3,)),
        Matrices(r"blocks.*(qkv|mod).*kernel", (1,), (3, 4)),
        Matrices(r"blocks.*kernel", (1,), (2,)),
    )
    presets = {"flux-dev": partial(published, True), "flux-schnell": partial(published, False)}

    def check(self, where: Any) -> None:
        """Raises `UserError`, naming `where`, if the transformer takes other widths than the rest has."""
        transformer, text = self.config("transformer"), dict(self.text)
        tokens = self.config("clip_text").max_position_embeddings
        if text.keys() != {"t5_length", "clip_length"} or not 1 <= text["clip_length"] <= tokens:
            raise UserError(
                f"{where}: text {text}; expected a t5_length, and a clip_length of at most {tokens}; convert the model again"
            )
        widths = (
            ("t5 width", transformer.context_in_dim, self.config("t5").d_model),
            ("clip_text width", transformer.vec_in_dim, self.config("clip_text").hidden_size),
            ("vae latent channels x 4", transformer.in_channels, 4 * self.config("vae").z_channels),
        )
        self.check_widths(where, widths)

    def public_names(self) -> PublicNames:
        """BFL's, diffusers', and those of the trainers of LoRAs."""
        return public_names(self.config("transformer"), self.config("clip_text"), self.config("t5"))

    # --- text

    def load_tokenizers(self, folder: Path) -> Tokenizers:
        """T5's and CLIP's."""
        return Tokenizers.load(folder, **dict(self.text))

    def text_ids_spec(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """`t5` and `clip_text`."""
        lengths = dict(self.text)
        return {
            name: jax.ShapeDtypeStruct((batch, lengths[length]), jnp.int32)
            for name, length in (("t5", "t5_length"), ("clip_text", "clip_length"))
        }

    @property
    def text_rows(self) -> int:
        """T5's tokens."""
        return dict(self.text)["t5_length"]

    def encode_text(self, params: Mapping[str, Any], ids: Mapping[str, Any]) -> TextCondition:
        """T5's states and CLIP's pooled vector."""
        states = self.module("t5").apply({"params": params["t5"]}, ids["t5"])
        _, pooled = self.module("clip_text").apply({"params": params["clip_text"]}, ids["clip_text"])
        return TextCondition(states, pooled)

    # --- latents

    def pack(self, latents: jax.Array) -> jax.Array:
        """Squares of 2 x 2 latent pixels, channel-major."""
        return pack_latents(latents)

    def unpack(self, tokens: jax.Array, height: int, width: int) -> jax.Array:
        """The inverse of `pack`; sizes in latent pixels."""
        return unpack_latents(tokens, height, width)

    # --- the transformer

    def velocity(
        self, params: Any, tokens: jax.Array, t: jax.Array, text: TextCondition, size: tuple[int, int], **inputs: Any
    ):
        """See `Family.velocity`."""
        return weights_model(self).apply(
            {"params": params},
            tokens,
            jnp.asarray(image_ids(*size)),
            text.states,
            jnp.zeros((1, text.states.shape[1], 3)),
            t,
            text.pooled,
            **inputs,
        )

    def forward_flops(self, image_rows: int, text_rows: int) -> int:
        """See `Family.forward_flops`."""
        c = self.config("transformer")
        return self.flops_of(image_rows, text_rows, 2, 12 * c.depth + 3 * c.depth_single_blocks + 2)
