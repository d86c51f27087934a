"""The networks that measure: CLIP and DINO, from folders that the converter writes.

Axis letters: n pictures or texts, d embedding, y, x patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dynaip_jax import images
from dynaip_jax.errors import UserError
from dynaip_jax.families.tokenizers import CLIP_LENGTH, check_tokenizer
from dynaip_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from dynaip_jax.models.dino import Dino, DinoConfig
from dynaip_jax.runtime.sharding import on_one_device
from dynaip_jax.storage.bundle import Bundle

BATCHES = (1, 4, 16)  # pictures or texts at once: as few programs
DINO_RESIZE, DINO_CROP = 256, 224  # pixels


class ClipMeasure:
    """CLIP's two towers with their projections. Raises `UserError` for a folder that holds none."""

    def __init__(self, path: str | Path):
        bundle = Bundle.open(path, ("clip",), "clip")
        self.vision = bundle.config("clip_vision", CLIPVisionConfig)
        self.text = bundle.config("clip_text", CLIPTextConfig)
        self._tokenizer = check_tokenizer(bundle.part("tokenizers") / "clip", "convert the measure again")
        last = self.vision.num_hidden_layers
        modules: dict[str, Any] = dict(clip_vision=CLIPVision(self.vision), clip_text=CLIPText(self.text))
        vision = partial(modules["clip_vision"].init, layers=(last,))
        self._params = dict(
            clip_vision=_load(bundle, "clip_vision", vision, CLIPVision.inputs_spec(self.vision)),
            clip_text=_load(bundle, "clip_text", modules["clip_text"].init, CLIPText.inputs_spec(self.text)),
        )
        widths = dict(clip_projection=self.vision.hidden_size, text_projection=self.text.hidden_size)
        for name, width in widths.items():
            size = (width, bundle.manifest["components"].get(name, {}).get("config", {}).get("projection_dim"))
            if type(size[1]) is not int:
                raise UserError(f"`clip` {path}: has no {name}; expected a whole CLIP; convert the measure again")
            target = {"kernel": jax.ShapeDtypeStruct(size, jnp.float32)}
            self._params[name] = bundle.load(name, on_one_device(target))
        self._encode = jax.jit(partial(_clip_images, modules["clip_vision"], last))
        self._read = jax.jit(partial(_clip_texts, modules["clip_text"]))

    @property
    def name(self) -> str:
        """What a report calls it, such as "CLIP ViT-B/32"."""
        size = {768: "B", 1024: "L"}.get(self.vision.hidden_size, str(self.vision.hidden_size))
        side = "" if self.vision.image_size == 224 else f"@{self.vision.image_size}"
        return f"CLIP ViT-{size}/{self.vision.patch_size}{side}"

    def images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings float32 `[n, d]` of length 1 of pictures uint8 `[H, W, 3]`."""
        side = self.vision.image_size
        pixels = [images.centre_pixels(p, side, side, images.CLIP_MEAN, images.CLIP_STD) for p in pictures]
        return _in_batches(lambda x: self._encode(self._params, x), np.stack(pixels))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings float32 `[n, d]` of length 1; what lies beyond CLIP's 77 tokens is not read."""
        options = dict(padding="max_length", max_length=min(CLIP_LENGTH, self.text.max_position_embeddings))
        ids = np.asarray(self._tokenizer(list(texts), truncation=True, **options)["input_ids"], np.int32)
        return _in_batches(lambda x: self._read(self._params, x), ids)


class DinoMeasure:
    """DINO or DINOv2. Raises `UserError` for a folder that holds none."""

    def __init__(self, path: str | Path):
        bundle = Bundle.open(path, ("dino",), "dino")
        self.config = bundle.config("dino", DinoConfig)
        module = Dino(self.config)
        self._params = _load(bundle, "dino", module.init, Dino.inputs_spec(self.config))
        self._encode = jax.jit(lambda params, pixels: module.apply({"params": params}, pixels))

    @property
    def name(self) -> str:
        """What a report calls it, such as "DINO ViT-S/16"."""
        return self.config.name

    def images(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings float32 `[n, d]` of length 1 of pictures uint8 `[H, W, 3]`: the class token's."""
        return _in_batches(
            lambda x: _unit(self._encode(self._params, x)[0]), np.stack([_dino_pixels(p) for p in pictures])
        )

    def patches(self, picture: np.ndarray) -> np.ndarray:
        """Embeddings float32 `[y, x, d]` of length 1 of the patches of a whole picture uint8 `[H, W, 3]`, squeezed into a square."""
        pixels = _dino_pixels(_squeezed(picture), DINO_CROP)
        return np.asarray(_unit(self._encode(self._params, pixels[None])[1]))[0]


def _squeezed(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((DINO_CROP, DINO_CROP), Image.Resampling.BICUBIC))


def _dino_pixels(picture: np.ndarray, resize: int = DINO_RESIZE) -> np.ndarray:
    return images.centre_pixels(picture, resize, DINO_CROP, images.IMAGENET_MEAN, images.IMAGENET_STD)


def _clip_images(module: Any, last: int, params: Any, pixels: jax.Array) -> jax.Array:
    _, pooled = module.apply({"params": params["clip_vision"]}, pixels, layers=(last,))
    return _unit(pooled @ params["clip_projection"]["kernel"])


def _clip_texts(module: Any, params: Any, ids: jax.Array) -> jax.Array:
    _, pooled = module.apply({"params": params["clip_text"]}, ids)
    return _unit(pooled @ params["text_projection"]["kernel"])


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _in_batches(encode: Callable[[np.ndarray], jax.Array], inputs: np.ndarray) -> np.ndarray:
    """`encode` of all inputs, in batches of one of `BATCHES`; the last one is filled up."""
    size = next((n for n in BATCHES if n >= len(inputs)), BATCHES[-1])
    made = []
    for at in range(0, len(inputs), size):
        part = inputs[at : at + size]
        filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        made.append(np.asarray(encode(filled))[: len(part)])
    return np.concatenate(made)


def _load(bundle: Bundle, name: str, init: Callable[..., Any], spec: dict[str, jax.ShapeDtypeStruct]) -> Any:
    """A component's parameters, float32."""
    boxed = jax.eval_shape(init, jax.random.key(0), *spec.values())["params"]
    return bundle.load(name, on_one_device(nn.meta.unbox(boxed)))
