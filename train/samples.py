"""The grid drawn while training: what the averaged weights make of fixed prompts, references and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynaip_jax import flow
from dynaip_jax.adapters.dynaip import DynaIPConfig
from dynaip_jax.data.samples import open_dataset, pictures
from dynaip_jax.errors import UserError
from dynaip_jax.images import files as images
from dynaip_jax.sampling.pipeline import decode, denoise, encode_text, make_image_prompt
from train.assemble import Models
from train.config import TrainConfig
from train.step import TrainState

COLUMNS = {"text only": None, "DDS on": 0.0, "DDS off": 1.0}  # text gain; None: no image prompt
CELL = 256  # pixels a side at most


class Sampler:
    """Draws `WORKDIR/samples/step_NNNNNN.png`: a row a prompt; its reference, then `COLUMNS`."""

    def __init__(self, config: TrainConfig, models: Models, mesh: Mesh, workdir: Path):
        self._sample, self._models, self._folder = config.sample, models, workdir / "samples"
        recipe = models.recipe
        self._vae = recipe.config("vae")
        unit = 2 * self._vae.downsample
        if config.sample.size % unit:
            raise UserError(f"--sample.size {config.sample.size}: expected a multiple of {unit}")
        self._prompts, self._references = _prompts_and_references(config)
        text = encode_text(
            recipe.config("t5"),
            recipe.config("clip_text"),
            models.frozen["t5"],
            models.frozen["clip_text"],
            models.tokenizers.t5(self._prompts),
            models.tokenizers.clip(self._prompts),
        )
        self._text = [jax.tree.map(lambda x, n=n: x[n : n + 1], text) for n in range(len(self._prompts))]
        side = config.sample.size // self._vae.downsample
        self._noise = np.asarray(jax.random.normal(jax.random.key(config.seed), (1, self._vae.z_channels, side, side)))
        self._times = flow.schedule(config.sample.steps, (side // 2) ** 2, recipe.schedule)

    def draw(self, step: int, state: TrainState) -> None:
        """Draws the grid with the averaged weights of `state`; process 0 writes it."""
        cells = []
        for text, reference in zip(self._text, self._references, strict=True):
            cells.append(images.labelled(images.square(reference), "reference", self._cell))
            for label, text_gain in COLUMNS.items():
                picture = images.to_uint8(self._picture(state, text, reference, text_gain))
                cells.append(images.labelled(picture, label, self._cell))
        if jax.process_index() == 0:
            self._folder.mkdir(exist_ok=True)
            grid = images.grid(cells, columns=1 + len(COLUMNS))
            settings = dict(step=step, prompts=self._prompts)
            images.save_png(grid, self._folder / f"step_{step:06d}.png", settings, overwrite=True)

    @property
    def _cell(self) -> int:
        return min(CELL, max(128, self._sample.size))

    def _picture(self, state: TrainState, text: Any, reference: np.ndarray, text_gain: float | None) -> np.ndarray:
        recipe, frozen = self._models.recipe, self._models.frozen
        transformer, prompt = recipe.config("transformer"), None
        if text_gain is not None and isinstance(recipe.adapter, DynaIPConfig):
            vision = recipe.config("clip_vision")
            pixels = images.clip_pixels(reference, vision.image_size)[None, None]
            options = dict(image_gain=jnp.float32(1), text_gain=jnp.float32(text_gain))
            prompt, _ = make_image_prompt(
                vision, recipe.adapter, frozen["clip_vision"], state.ema["adapter"], pixels, options
            )
        latents, _ = denoise(
            transformer,
            state.ema.get("transformer", frozen.get("transformer")),
            self._noise,
            text,
            prompt,
            self._times,
            guidance=jnp.float32(self._sample.guidance) if transformer.guidance_embed else None,
            true_cfg=None,
            window=jnp.array([0.0, 1.0]),
        )
        decoded = decode(self._vae, frozen["vae"], latents)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            decoded = multihost_utils.process_allgather(decoded, tiled=True)
        return np.asarray(decoded[0])


def _prompts_and_references(config: TrainConfig) -> tuple[list[str], list[np.ndarray]]:
    """As the config names them, or from the dataset's first rows."""
    sample = config.sample
    if sample.prompts and sample.references and len(sample.prompts) != len(sample.references):
        raise UserError(
            f"--sample.prompts: {len(sample.prompts)} for {len(sample.references)} --sample.references; give one a prompt"
        )
    dataset = open_dataset(config.data.path)
    count = len(sample.prompts) or len(sample.references) or min(sample.rows, len(dataset))
    rows = [dataset[n % len(dataset)] for n in range(count)]
    prompts = list(sample.prompts) or [row.caption for row in rows]
    if sample.references:
        return prompts, [images.load_image(path) for path in sample.references]
    return prompts, [pictures(row, f"row {row.number}", False)[1] for row in rows]
