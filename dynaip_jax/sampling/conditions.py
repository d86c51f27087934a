"""What a generation is conditioned on: prompts and reference pictures as arrays for the backbone.

Axis letters as in `dynaip_jax.types`; n prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dynaip_jax import images
from dynaip_jax.adapters.base import AdapterConfig
from dynaip_jax.adapters.dynaip import DynaIP, DynaIPConfig
from dynaip_jax.adapters.hmoe import HMoE
from dynaip_jax.errors import UserError
from dynaip_jax.families.base import Family
from dynaip_jax.families.tokenizers import Tokenizers
from dynaip_jax.runtime.programs import Quick
from dynaip_jax.sampling.options import SampleOptions, texts
from dynaip_jax.types import ImagePrompt, TextCondition

# What `images.load_image` reads: a path, the bytes of a file, a binary file object, a PIL image, an array of NumPy, JAX or torch.
Picture: TypeAlias = Any


CLIP_PROJECTION = "clip_projection"  # a bundle's component: the matrix from CLIP's pooled state to its embedding


class Conditions(NamedTuple):
    """`text`: one row for all pictures or a row a picture; with true CFG then the negative prompt's, in the same number.
    `image_prompt`: one for all pictures, or one a picture; None: plain text to image."""

    text: TextCondition
    image_prompt: ImagePrompt | None = None


class Subjects(NamedTuple):
    """Reference pictures, uint8 `[H, W, 3]`, and what is said of them: none of `masks` and `words`, or one for each; and the files
    of pictures and masks, None for those that are in none."""

    references: Sequence[np.ndarray] = ()
    masks: Sequence[images.Mask] = ()
    words: Sequence[str] = ()
    reference_paths: Sequence[str | None] = ()
    mask_paths: Sequence[str | None] = ()

    @classmethod
    def read(cls, references: Any = (), masks: Any = (), words: str | Sequence[str] = ()) -> Subjects:
        """Reads pictures in any form, one or several of each. Raises `UserError` for what `images` refuses, and for masks or words in
        another number than references."""
        given, masked = images.several(references, "references"), images.several(masks, "masks")
        named = texts("words", words)
        if masked and len(masked) != len(given):
            raise UserError(
                f"`masks`: {len(masked)} masks for {len(given)} references; pass one for each reference, or none"
            )
        if named and len(named) != len(given):
            raise UserError(
                f"`words`: words for {len(named)} subjects and {len(given)} references; give one a reference, or none"
            )
        return cls(
            images.load_images(given, "references"),
            [images.read_mask(mask, f"`masks` {n}") for n, mask in enumerate(masked, 1)],
            named,
            [images.named(picture, None) for picture in given],
            [images.named(mask, None) for mask in masked],
        )

    def regions(self, asked: str | None) -> str:
        """Where subjects may appear: "masks", "auto" or "none", as `asked` for or by default.

        Raises `UserError` for "auto" without words of each.
        """
        count = len(self.references)
        mode = asked or ("auto" if any(self.words) else "none")
        if self.masks:
            return "masks"
        if mode == "auto" and count and not (self.words and all(self.words)):
            raise UserError(
                f"`regions` auto: {sum(map(bool, self.words))} of {count} references have words of the prompt; give each its own "
                "with `words`, or pass `masks` or `regions` none"
            )
        return mode


@partial(Quick, static_argnums=0)
def encode_text(family: Family, params: Mapping[str, Any], ids: Mapping[str, jax.Array]) -> TextCondition:
    """The text condition of token ids `[n, t]` by text encoder; `params`: of the text encoders."""
    return family.encode_text(params, ids)


@partial(Quick, static_argnums=(0, 1))
def make_image_prompt(
    family: Family, config: AdapterConfig, vision_params: Any, params: Any, pixels: jax.Array, options: dict[str, Any]
) -> tuple[ImagePrompt, jax.Array | None]:
    """What the adapter makes of `pixels` `[b, s, S, S, 3]`: the `ImagePrompt`, and DynaIP's routing weights `[b, s, 3]` (None: another
    adapter, which has none). `options`: see `DynaIP`."""
    b, s = pixels.shape[:2]
    flat, compute = pixels.reshape(b * s, *pixels.shape[2:]), family.compute(family.encoder)
    if not isinstance(config, DynaIPConfig):
        pooled = family.pooled_vision(vision_params, flat)
        if CLIP_PROJECTION in params:
            pooled = pooled @ params[CLIP_PROJECTION]["kernel"].astype(pooled.dtype)
        own = {name: value for name, value in options.items() if name != "granularity"}
        other: Any = config.module(compute)
        return other.apply({"params": params["adapter"]}, pooled.reshape(b, s, -1), **own), None
    levels = family.vision(vision_params, flat, config.hmoe.levels)
    features = [level.reshape(b, s, *level.shape[1:]) for level in levels]
    adapter: Any = DynaIP(config, compute)
    return adapter.apply({"params": params}, features, **options)


@partial(Quick, static_argnums=(0, 1))
def routing(family: Family, config: DynaIPConfig, vision_params: Any, params: Any, pixels: jax.Array) -> jax.Array:
    """Routing weights float32 `[b, 3]` of `pixels` `[b, S, S, 3]`, of a token router the mean of its tokens; nothing else is computed."""
    levels = family.vision(vision_params, pixels, config.hmoe.levels)
    mixer: Any = HMoE(config.hmoe, family.compute("clip_vision"))
    _, weights = mixer.apply({"params": params["hmoe"]}, levels)
    return weights.reshape(len(weights), -1, 3).mean(axis=1)


def reference_pixels(family: Family, references: Sequence[np.ndarray], fit: Any) -> np.ndarray:
    """The encoder's input float32 `[s, size, size, 3]` of pictures uint8 `[H, W, 3]`."""
    size, encoder = family.config(family.encoder).image_size, family.encoder
    return np.stack([images.encoder_pixels(picture, size, fit, encoder) for picture in references])


def adapter_options(options: SampleOptions, **places: np.ndarray | None) -> dict[str, Any]:
    """What the adapter is told, as float32 arrays; `places`: `region` or `words`."""
    told: dict[str, Any] = dict(image_gain=options.image_scale, text_gain=options.text_gain)
    if options.block_scale is not None:
        blocks = np.asarray(options.block_scale, np.float32)[:, None, None]
        told = {name: blocks * np.asarray(gain, np.float32) for name, gain in told.items()}
    told |= dict(granularity=options.granularity) | places
    return {name: None if value is None else jnp.asarray(value, jnp.float32) for name, value in told.items()}


def places(
    family: Family,
    tokenizers: Tokenizers,
    prompts: Sequence[str],
    subjects: Subjects,
    mode: str,
    size: tuple[int, int],
) -> dict[str, np.ndarray | None]:
    """`region` `[1, s, i]` from masks, or `words` `[n, s, t]`, for pictures of `size` = (height, width)."""
    if mode == "masks":
        masks = [mask.fitted(*size) for mask in subjects.masks]
        return dict(region=images.regions(masks, family.multiple)[None])
    named = [w for w in subjects.words if w]
    rows = np.stack([tokenizers.words(prompt, named) for prompt in prompts])  # checked even where they are not used
    return dict(words=None if mode == "none" else rows)
