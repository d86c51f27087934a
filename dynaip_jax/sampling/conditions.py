"""What a generation is conditioned on: prompts and reference pictures as arrays for the backbone.

Axis letters as in `dynaip_jax.types`; n prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dynaip_jax import images
from dynaip_jax.adapters.dynaip import DynaIP, DynaIPConfig
from dynaip_jax.errors import UserError
from dynaip_jax.families.base import Family
from dynaip_jax.families.tokenizers import Tokenizers
from dynaip_jax.runtime.compiling import QUICK
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.types import ImagePrompt, TextCondition

Picture = str | Path | np.ndarray | Image.Image


class Conditions(NamedTuple):
    """`text`: one row for all pictures or a row a picture; with true CFG then the negative prompt's, in the same number.
    `image_prompt`: one for all pictures, or one a picture; None: plain text to image."""

    text: TextCondition
    image_prompt: ImagePrompt | None = None


class Subjects(NamedTuple):
    """Reference pictures and what is said of them: none of `masks` and `words`, or one for each."""

    references: Sequence[Picture] = ()
    masks: Sequence[str | Path | np.ndarray] = ()
    words: Sequence[str] = ()

    def regions(self, asked: str | None) -> str:
        """Where subjects may appear: "masks", "auto" or "none", as `asked` for or by default.

        Raises `UserError` for masks or words in another number than references, and for "auto" without words of each.
        """
        count = len(self.references)
        if self.masks and len(self.masks) != count:
            raise UserError(
                f"`masks`: {len(self.masks)} masks for {count} references; pass one for each reference, or none"
            )
        if self.words and len(self.words) != count:
            raise UserError(
                f"`words`: words for {len(self.words)} subjects and {count} references; give one a reference, or none"
            )
        mode = asked or ("auto" if any(self.words) else "none")
        if self.masks:
            return "masks"
        if mode == "auto" and count and not (self.words and all(self.words)):
            raise UserError(
                f"`regions` auto: {sum(map(bool, self.words))} of {count} references have words of the prompt; give each its own "
                "with `words`, or pass `masks` or `regions` none"
            )
        return mode


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def encode_text(family: Family, params: Mapping[str, Any], ids: Mapping[str, jax.Array]) -> TextCondition:
    """The text condition of token ids `[n, t]` by text encoder; `params`: of the text encoders."""
    return family.encode_text(params, ids)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def make_image_prompt(
    family: Family, config: DynaIPConfig, vision_params: Any, params: Any, pixels: jax.Array, options: dict[str, Any]
) -> tuple[ImagePrompt, jax.Array]:
    """CLIP features of `pixels` `[b, s, S, S, 3]`, then the adapter: `ImagePrompt` and routing weights `[b, s, 3]`.

    `options`: see `DynaIP`.
    """
    b, s = pixels.shape[:2]
    levels = family.vision(vision_params, pixels.reshape(b * s, *pixels.shape[2:]), config.hmoe.levels)
    features = [level.reshape(b, s, *level.shape[1:]) for level in levels]
    adapter: Any = DynaIP(config, family.compute("clip_vision"))
    return adapter.apply({"params": params}, features, **options)


def reference_pixels(references: Sequence[Picture], size: int, fit: Any) -> np.ndarray:
    """CLIP's input float32 `[s, size, size, 3]`."""
    return np.stack([images.clip_pixels(rgb(r), size, fit) for r in references])


def adapter_options(options: SampleOptions, **places: np.ndarray | None) -> dict[str, Any]:
    """What the adapter is told, as float32 arrays; `places`: `region` or `words`."""
    told = dict(image_gain=options.image_scale, text_gain=options.text_gain, granularity=options.granularity) | places
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
        masks = [mask_of(mask, *size) for mask in subjects.masks]
        return dict(region=images.regions(masks, family.multiple)[None])
    named = [w for w in subjects.words if w]
    rows = np.stack([tokenizers.words(prompt, named) for prompt in prompts])  # checked even where they are not used
    return dict(words=None if mode == "none" else rows)


def rgb(picture: Picture) -> np.ndarray:
    """uint8 `[H, W, 3]` from a path, PIL image or array."""
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    return picture if isinstance(picture, np.ndarray) else images.load_image(picture)


def mask_of(mask: str | Path | np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 `[height, width]` in [0, 1] from a file or such an array."""
    if not isinstance(mask, np.ndarray):
        return images.load_mask(mask, height, width)
    if mask.shape != (height, width):
        raise UserError(
            f"`masks`: an array of shape {list(mask.shape)}; expected [{height}, {width}], the picture's size"
        )
    return mask.astype(np.float32)
