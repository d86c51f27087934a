"""Stage `vae`: the autoencoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynaip_jax.shapeland.dataset import sample_mixed
from dynaip_jax.shapeland.world import generator, render
from train.shapeland.configs import FAMILY
from train.shapeland.fit import Loss, fit
from train.shapeland.losses import unit
from train.shapeland.processes import in_processes
from train.shapeland.workdir import save_weights

PICTURES = 8000
STEPS = dict(quarters=2200, whole=400)
BATCH = dict(quarters=16, whole=8)
QUARTER = 32  # pixels
KL = 0.006  # at this weight the noise of latents costs about 0.006 in [-1, 1] of each pixel, which is not seen
SCALE = "scale.json"  # shift and scale of latents
MEASURED = 512  # pictures that give them


def train_vae(folder: Path, seed: int) -> None:
    """L1, L2 and a weak KL, first on quarters of pictures (cheap), then on whole ones; latents are then scaled to unit size.

    Latents of half the size must decode to the picture of half the size (EQ-VAE, arXiv 2502.09509): they are then laid out like
    pictures, which a base model learns sooner.
    """
    pictures = np.stack(in_processes(partial(_image, seed), PICTURES))
    module = FAMILY.module("vae")
    loss = _loss(module)
    params = FAMILY.init_params("vae", jax.random.key(seed))
    for part, rate in (("quarters", 2e-3), ("whole", 6e-4)):
        params = fit(folder / part, params, loss, _batches(pictures, seed, part), STEPS[part], rate, seed)
    moments = jax.jit(lambda x: module.apply({"params": params}, unit(x), method="encode"))(pictures[:MEASURED])
    mean, logvar = np.split(np.asarray(moments), 2, axis=-1)
    scale = dict(shift_factor=float(mean.mean()), scale_factor=float(1 / np.sqrt(mean.var() + np.exp(logvar).mean())))
    (folder / SCALE).write_text(json.dumps(scale))
    save_weights(folder, params)


def _image(seed: int, n: int) -> np.ndarray:
    return render(sample_mixed(generator(seed, "train", n))).image


def _loss(module: Any) -> Loss:
    def loss(params, batch, key):
        x = unit(batch)
        moments = module.apply({"params": params}, x, method="encode")
        mean, logvar = jnp.split(moments, 2, axis=-1)
        noise = jnp.moveaxis(jax.random.normal(key, mean.shape), -1, 1)
        latents = jnp.moveaxis(module.apply({}, moments, noise, method="latents"), 1, -1)

        def error(latents, target):
            return module.apply({"params": params}, jnp.moveaxis(latents, -1, 1), method="decode") - target

        whole, half = error(latents, x), error(_halved(latents), _halved(x))
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
        cost = [jnp.abs(e).mean() + jnp.square(e).mean() for e in (whole, half)]
        psnr, psnr_half = (-10 * jnp.log10(jnp.mean(e**2) / 4) for e in (whole, half))
        return cost[0] + 0.5 * cost[1] + KL * kl, dict(psnr=psnr, psnr_half=psnr_half, kl=kl)

    return loss


def _halved(x: jax.Array) -> jax.Array:
    """`[b, h, w, c]` at half the size: means of squares of four."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def _batches(pictures: np.ndarray, seed: int, part: str) -> Callable[[int], np.ndarray]:
    """Batches of whole pictures, or of a random quarter of each."""

    def batch_of(step: int) -> np.ndarray:
        rng = np.random.default_rng((seed, step, part == "whole"))
        chosen = pictures[rng.choice(len(pictures), BATCH[part], replace=False)]
        if part == "whole":
            return chosen
        top, left = rng.integers(0, QUARTER + 1, (2, len(chosen)))
        return np.stack([x[t : t + QUARTER, s : s + QUARTER] for x, t, s in zip(chosen, top, left, strict=True)])

    return batch_of
