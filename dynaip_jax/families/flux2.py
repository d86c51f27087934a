"""FLUX.2 [klein]: the transformer with Qwen3's hidden states as text, its autoencoder, and CLIP vision for reference pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynaip_jax import flow
from dynaip_jax.errors import UserError
from dynaip_jax.families.base import Component, Matrices, Preset
from dynaip_jax.families.chat import ChatTokenizer
from dynaip_jax.families.mmdit import MMDiT
from dynaip_jax.families.quantize import weights_model
from dynaip_jax.flow import ScheduleConfig
from dynaip_jax.models.clip import CLIPVision, CLIPVisionConfig
from dynaip_jax.models.flux2 import Flux2, Flux2Config
from dynaip_jax.models.flux2_vae import Flux2VAE, Flux2VAEConfig
from dynaip_jax.models.qwen3 import Qwen3, Qwen3Config
from dynaip_jax.types import TextCondition

LENGTH = 512  # tokens a prompt
LONGEST = 1 << 14
MANY_STEPS = 200  # where the shift no longer depends on their number
FEW_TOKENS = 4300  # more have the shift of many steps, whatever their number


def shift(tokens: int, steps: int) -> float:
    """mu, the logarithm of the factor by which times are shifted: linear in tokens at 10 and at 200 steps, and in steps between and
    beyond. It jumps at `FEW_TOKENS`. Source: black-forest-labs/flux2 `sampling.compute_empirical_mu`."""
    many = 0.00016927 * tokens + 0.45666666
    if tokens > FEW_TOKENS:
        return many
    ten = 8.73809524e-05 * tokens + 1.89833333
    slope = (many - ten) / (MANY_STEPS - 10)
    return many + slope * (steps - MANY_STEPS)


def defaults(distilled: bool) -> dict[str, Any]:
    """What options stand for that are left out: four steps, or fifty with guidance away from an empty prompt."""
    how = dict(steps=4) if distilled else dict(steps=50, true_cfg=4.0)
    return how | dict(guidance=None, height=1024, width=1024)


def published(large: bool, distilled: bool) -> Preset:
    """FLUX.2 [klein] 9B (`large`) or 4B, `distilled` or base, with CLIP ViT-L/14 for reference pictures."""
    configs = dict(
        transformer=Flux2Config.klein_9b() if large else Flux2Config.klein_4b(),
        vae=Flux2VAEConfig.flux2(),
        qwen3=Qwen3Config.of_8b() if large else Qwen3Config.of_4b(),
        clip_vision=CLIPVisionConfig.large(),
    )
    return Preset(configs, {}, dict(qwen3_length=LENGTH), defaults(distilled))


class Flux2Klein(MMDiT):
    """FLUX.2 [klein] at given sizes."""

    name = "flux2"
    components = {
        "transformer": Component(Flux2Config, Flux2),
        "vae": Component(Flux2VAEConfig, Flux2VAE),
        "qwen3": Component(Qwen3Config, Qwen3),
        "clip_vision": Component(CLIPVisionConfig, CLIPVision, lambda c: dict(layers=(c.num_hidden_layers,))),
    }
    text_encoders = ("qwen3",)
    reads_pictures = True
    matrices = (
        Matrices(r"blocks.*(attn_proj|attn_out).*kernel", (1, 2), (3,)),
        Matrices(r"blocks.*qkv.*kernel", (1,), (3, 4)),
        Matrices(r"blocks.*(in_layer|mlp_in).*kernel", (1,), (3,)),
        Matrices(r"blocks.*kernel", (1,), (2,)),
    )
    presets = {
        f"flux2-klein-{kind}{size}": partial(published, size == "9b", not kind)
        for kind in ("base-", "")
        for size in ("4b", "9b")
    }

    def check(self, where: Any) -> None:
        """Raises `UserError`, naming `where`, if the transformer takes other widths than the rest has."""
        transformer, text = self.config("transformer"), dict(self.text)
        if text.keys() != {"qwen3_length"} or not 1 <= text["qwen3_length"] <= LONGEST:
            raise UserError(f"{where}: text {text}; expected a qwen3_length of 1 to {LONGEST}; convert the model again")
        if self.schedule != ScheduleConfig():
            raise UserError(
                f"{where}: schedule in bundle.json; expected {{}}, FLUX.2 has but one; convert the model again"
            )
        widths = (
            ("qwen3 width", transformer.context_in_dim, self.config("qwen3").width),
            ("vae latent channels x 4", transformer.in_channels, self.config("vae").latent_channels),
        )
        self.check_widths(where, widths)

    # --- text

    def load_tokenizers(self, folder: Path) -> ChatTokenizer:
        """Qwen3's."""
        return ChatTokenizer.read(folder / "qwen3", dict(self.text)["qwen3_length"])

    def text_ids_spec(self, batch: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """`qwen3`."""
        return dict(qwen3=jax.ShapeDtypeStruct((batch, self.text_rows), jnp.int32))

    @property
    def text_rows(self) -> int:
        """Qwen3's tokens, padding too."""
        return dict(self.text)["qwen3_length"]

    def encode_text(self, params: Mapping[str, Any], ids: Mapping[str, Any]) -> TextCondition:
        """Three of Qwen3's hidden states, joined."""
        return TextCondition(self.module("qwen3").apply({"params": params["qwen3"]}, ids["qwen3"]), None)

    # --- latents

    @property
    def multiple(self) -> int:
        """A token is one latent pixel."""
        return self.downsample

    def latent(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape `(c, h, w)` of the latents of a picture of `height` x `width` pixels."""
        return self.config("vae").latent_channels, height // self.downsample, width // self.downsample

    def tokens(self, latent: tuple[int, ...]) -> int:
        """As many as latent pixels."""
        return latent[-2] * latent[-1]

    def latents(self, moments: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Their mean with and without `noise`: FLUX.2's encoder draws nothing, and so its transformer was trained."""
        return self.module("vae").apply({}, moments, method="latents")

    def pack(self, latents: jax.Array) -> jax.Array:
        """Latent pixels, row by row."""
        return jnp.moveaxis(latents.reshape(*latents.shape[:2], -1), 1, 2)

    def unpack(self, tokens: jax.Array, height: int, width: int) -> jax.Array:
        """The inverse of `pack`; sizes in latent pixels."""
        return jnp.moveaxis(tokens, 1, 2).reshape(len(tokens), -1, height, width)

    def reference_ids(self, number: int, height: int, width: int) -> np.ndarray:
        """Each picture on a grid of its own, ten later than the one before."""
        return positions(height, width, time=10 + 10 * number)

    # --- the transformer

    def velocity(
        self, params: Any, tokens: jax.Array, t: jax.Array, text: TextCondition, size: tuple[int, int], **inputs: Any
    ):
        """See `Family.velocity`."""
        return weights_model(self).apply(
            {"params": params},
            tokens,
            jnp.asarray(positions(*size)),
            text.states,
            jnp.asarray(text_positions(text.states.shape[1])),
            t,
            references=text.references,
            **inputs,
        )

    def forward_flops(self, image_rows: int, text_rows: int) -> int:
        """See `Family.forward_flops`."""
        return self.flops_of(image_rows, text_rows, 3, 12 + 3 + 2)

    # --- schedule

    def times(self, steps: int, tokens: int) -> np.ndarray:
        """Sampling times, shifted by what tokens and steps say."""
        return flow.shift_times(np.linspace(1.0, 0.0, steps + 1), math.exp(shift(tokens, steps))).astype(np.float32)

    def shift(self, tokens: int) -> float:
        """The factor of many steps."""
        return math.exp(shift(tokens, MANY_STEPS))


def positions(height: int, width: int, time: int = 0) -> np.ndarray:
    """Positions float32 `[1, i, 4]` = (time, row, column, 0) of latents of `height` x `width`."""
    axes = np.meshgrid([time], np.arange(height), np.arange(width), [0], indexing="ij")
    return np.stack(axes, axis=-1).reshape(1, -1, 4).astype(np.float32)


def text_positions(rows: int) -> np.ndarray:
    """Positions float32 `[1, rows, 4]` = (0, 0, 0, row) of text."""
    return np.pad(np.arange(rows, dtype=np.float32)[None, :, None], ((0, 0), (0, 0), (3, 0)))
