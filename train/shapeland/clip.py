"""Stage `clip`: both towers of CLIP."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynaip_jax import images
from dynaip_jax.shapeland.dataset import UNSAID, sample_said
from dynaip_jax.shapeland.world import caption, description, generator, render, sample_scene
from train.shapeland.configs import CONFIGS, FAMILY
from train.shapeland.fit import Loss, choose, fit
from train.shapeland.losses import contrastive
from train.shapeland.processes import in_processes
from train.shapeland.tokenizers import load_tokenizers
from train.shapeland.workdir import save_weights

TOWERS = ("clip_vision", "clip_text")
PICTURES = 16_000
STEPS, BATCH, RATE = 550, 128, 1e-3
WIDTH = 96  # of the space in which pictures and texts are compared
LOG_SCALE = 2.3  # of similarities, to begin with


def train_clip(folder: Path, seed: int) -> None:
    """Both towers, by telling which description belongs to which picture."""
    pictures, texts = zip(*in_processes(partial(_described, seed), PICTURES), strict=True)
    pixels, ids = np.stack(pictures), load_tokenizers().clip(texts)

    def batch_of(step: int) -> tuple[np.ndarray, np.ndarray]:
        rows = choose(seed, step, len(pixels), BATCH)
        return pixels[rows], ids[rows]

    params = fit(folder / "run", _init(seed), _loss(), batch_of, STEPS, RATE, seed)
    save_weights(folder, {name: params[name] for name in TOWERS})


def _described(seed: int, n: int) -> tuple[np.ndarray, str]:
    """A picture and its description, or its caption if it shows several subjects."""
    rng = generator(seed, "train", n)
    scene = sample_scene(rng, 1, large=True) if n % 3 else sample_scene(rng, 1 + (n // 3) % 2)
    said = sample_said(rng, UNSAID)
    text = description(scene, said) if len(scene.subjects) == 1 else caption(scene, said)
    return render(scene).image, text


def _init(seed: int) -> dict[str, Any]:
    *tower_keys, see, read = jax.random.split(jax.random.key(seed), 4)
    params: dict[str, Any] = {name: FAMILY.init_params(name, key) for name, key in zip(TOWERS, tower_keys, strict=True)}
    for name, key, tower in (("see", see, "clip_vision"), ("read", read, "clip_text")):
        width = CONFIGS[tower].hidden_size
        params[name] = jax.random.normal(key, (width, WIDTH)) * width**-0.5
    return params | dict(scale=jnp.array(LOG_SCALE))


def _loss() -> Loss:
    vision, text = (FAMILY.module(name) for name in TOWERS)
    last = (CONFIGS["clip_vision"].num_hidden_layers,)

    def loss(params, batch, key):
        pictures, ids = batch
        x = (jnp.asarray(pictures, jnp.float32) / 255 - images.CLIP_MEAN) / images.CLIP_STD
        _, pooled = vision.apply({"params": params["clip_vision"]}, x, layers=last)
        _, words = text.apply({"params": params["clip_text"]}, ids)
        a, b = pooled @ params["see"], words @ params["read"]
        a, b = (v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (a, b))
        logits = a @ b.T * jnp.exp(params["scale"])
        return contrastive(logits), dict(accuracy=(logits.argmax(-1) == jnp.arange(len(a))).mean())

    return loss
