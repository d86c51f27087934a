"""Stage `text`: T5's encoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dynaip_jax.shapeland.dataset import sample_mixed, sample_text
from dynaip_jax.shapeland.world import generator
from train.shapeland.configs import CONFIGS, FAMILY, MASK, SPECIAL, WORDS
from train.shapeland.fit import Loss, choose, fit
from train.shapeland.losses import cross_entropy
from train.shapeland.processes import in_processes
from train.shapeland.tokenizers import load_tokenizers
from train.shapeland.workdir import save_weights

TEXTS = 40_000
STEPS, BATCH, RATE = 1000, 128, 4e-3
HIDDEN = 0.15  # share of words
NEAR = range(-4, 5)  # offsets of the words that each state must name


def train_text(folder: Path, seed: int) -> None:
    """T5's encoder by naming words: each state must tell its own word, a share of which is hidden, and the words `NEAR` to it.

    Masked words alone leave the states of words of a kind nearly alike, and do not ask which subject stands where.
    """
    config = CONFIGS["t5"]
    ids = load_tokenizers().t5(in_processes(partial(_text, seed), TEXTS))
    keys = jax.random.split(jax.random.key(seed + 1), len(NEAR))
    heads = {
        str(offset): jax.random.normal(key, (config.d_model, len(WORDS))) * 0.05
        for offset, key in zip(NEAR, keys, strict=True)
    }
    params = dict(t5=FAMILY.init_params("t5", jax.random.key(seed)), heads=heads)
    loss = _loss(FAMILY.module("t5"))
    params = fit(folder / "run", params, loss, lambda step: ids[choose(seed, step, len(ids), BATCH)], STEPS, RATE, seed)
    save_weights(folder, params["t5"])


def _text(seed: int, n: int) -> str:
    rng = generator(seed, "train", n)
    return sample_text(rng, sample_mixed(rng))


def _loss(module: Any) -> Loss:
    def loss(params, batch, key):
        words = batch >= len(SPECIAL)
        hidden = words & (jax.random.uniform(key, batch.shape) < HIDDEN)
        states = module.apply({"params": params["t5"]}, jnp.where(hidden, MASK, batch))
        cost, right, asked = 0.0, 0, 0
        for offset in NEAR:
            target = jnp.roll(batch, -offset, axis=1)
            both = words & jnp.roll(words, -offset, axis=1)
            logits = states @ params["heads"][str(offset)]
            cost += (cross_entropy(logits, target) * both).sum() / both.sum()
            right, asked = right + ((logits.argmax(-1) == target) & both).sum(), asked + both.sum()
        return cost / len(NEAR), dict(accuracy=right / asked)

    return loss
