"""Reference pictures that a model reads by itself, as tokens beside those of the picture, without any adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dynaip_jax import images
from dynaip_jax.errors import UserError
from dynaip_jax.families.base import Family
from dynaip_jax.runtime.programs import Quick
from dynaip_jax.types import References

LARGEST = 1024 * 1024  # pixels; larger pictures are made smaller
MOST = 16  # pictures


class Natives(NamedTuple):
    """Pictures uint8 `[H, W, 3]`, and their files, None for those that are in none."""

    pictures: Sequence[np.ndarray] = ()
    paths: Sequence[str | None] = ()

    @classmethod
    def read(cls, given: Any, family: Family) -> Natives:
        """Reads pictures in any form, one or several. Raises `UserError` for what `images` refuses, for a family that reads none by itself,
        and for pictures too small for a token."""
        sources = images.several(given, "native_references")
        if not sources:
            return cls()
        if not family.reads_pictures:
            raise UserError(
                "`native_references`: this model reads no pictures by itself; expected none; pass `references`, which an adapter reads"
            )
        if len(sources) > MOST:
            raise UserError(f"`native_references`: {len(sources)} pictures; expected at most {MOST}")
        pictures = images.load_images(sources, "native_references")
        for n, picture in enumerate(pictures, 1):
            if 0 in fitted(picture, family.multiple).shape:
                height, width = picture.shape[:2]
                raise UserError(
                    f"`native_references` {n}: {width} x {height} pixels; expected at least {family.multiple} a side; use a larger one"
                )
        return cls(pictures, [images.named(source, None) for source in sources])

    @property
    def settings(self) -> dict[str, Any]:
        """What PNG files say of them; empty if there are none."""
        if not self.pictures:
            return {}
        digests = [images.digest(picture) for picture in self.pictures]
        return dict(native_reference=list(self.paths), native_reference_fingerprint=digests)


def fitted(picture: np.ndarray, multiple: int) -> np.ndarray:
    """A picture uint8 `[H, W, 3]`, made smaller if it is larger than `LARGEST`, and its middle in multiples of `multiple` pixels.

    Source: diffusers `Flux2ImageProcessor`.
    """
    height, width = picture.shape[:2]
    if height * width > LARGEST:
        factor = math.sqrt(LARGEST / (height * width))
        size = int(width * factor), int(height * factor)
        picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
        height, width = picture.shape[:2]
    rows, columns = (side // multiple * multiple for side in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    return picture[top : top + rows, left : left + columns]


def encoded(family: Family, params: Any, natives: Natives) -> References | None:
    """The tokens of all pictures `[1, r, c]`, one after the other, and their positions; None if there are none. `params`: of the
    autoencoder."""
    tokens, ids = [], []
    for number, picture in enumerate(natives.pictures):
        pixels = fitted(picture, family.multiple)[None].astype(np.float32) / 127.5 - 1
        latents = _latents(family, params, pixels)
        tokens.append(family.pack(latents))
        ids.append(family.reference_ids(number, *latents.shape[2:]))
    return References(jnp.concatenate(tokens, axis=1), jnp.concatenate(ids, axis=1)) if tokens else None


@partial(Quick, static_argnums=0)
def _latents(family: Family, params: Any, pixels: jax.Array) -> jax.Array:
    """The mean latents `[1, c, h, w]` of a picture `[1, H, W, 3]` in [-1, 1]."""
    return family.latents(family.encode(params, pixels))
