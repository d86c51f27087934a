"""The grid drawn while training: what the averaged weights make of fixed prompts, references and noise."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dynaip_jax import images
from dynaip_jax.adapters.dynaip import DynaIPConfig
from dynaip_jax.data.records import Dataset
from dynaip_jax.data.samples import pictures
from dynaip_jax.errors import UserError
from dynaip_jax.runtime.layouts import Arranged
from dynaip_jax.sampling.conditions import Conditions, adapter_options, encode_text, make_image_prompt
from dynaip_jax.sampling.denoise import Parts, generate
from dynaip_jax.sampling.options import SampleOptions
from train.config import SampleConfig
from train.run import Run
from train.state import TrainState
from train.workdir import write_whole

COLUMNS = {"text only": None, "DDS on": 0.0, "DDS off": 1.0}  # text gain; None: no image prompt
CELL = 256  # pixels a side at most


class Sampler:
    """Draws `WORKDIR/samples/step_NNNNNN.png`: a row a prompt; its reference, then `COLUMNS`."""

    def __init__(self, run: Run):
        config, constants = run.config, run.constants
        self._run, self._sample, self._folder = run, config.sample, run.workdir / "samples"
        family = constants.family
        if config.sample.size % family.multiple:
            raise UserError(f"`sample.size` {config.sample.size}: expected a multiple of {family.multiple}")
        self._prompts, self._references = _prompts_and_references(config.sample, run.dataset)
        encoders = {name: run.frozen[name] for name in family.text_encoders}
        text = encode_text(family, encoders, run.tokenizers.ids(self._prompts))
        self._text = [jax.tree.map(lambda x, n=n: x[n : n + 1], text) for n in range(len(self._prompts))]
        latent = family.latent(config.sample.size, config.sample.size)
        self._noise = np.asarray(jax.random.normal(jax.random.key(config.seed), (1, *latent)))
        guidance = config.sample.guidance if family.takes_guidance else None
        self._options = SampleOptions(steps=config.sample.steps, guidance=guidance)

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        """Draws the grid with the averaged weights of `state`; process 0 writes it. No figures."""
        cells = []
        for text, reference in zip(self._text, self._references, strict=True):
            cells.append(images.labelled(images.square(reference), "reference", self._cell))
            for label, text_gain in COLUMNS.items():
                picture = images.to_uint8(self._picture(state, text, reference, text_gain))
                cells.append(images.labelled(picture, label, self._cell))
        if jax.process_index() == 0:
            grid = images.grid(cells, columns=1 + len(COLUMNS))
            self._write(grid, f"step_{step:06d}.png", dict(step=step, prompts=self._prompts))
        return {}

    def _write(self, grid: Any, name: str, settings: dict[str, Any]) -> None:
        self._folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as disk:  # the folder may be in a bucket
            images.save_png(grid, Path(disk) / name, settings)
            write_whole(self._folder / name, (Path(disk) / name).read_bytes())

    @property
    def _cell(self) -> int:
        return min(CELL, max(128, self._sample.size))

    def _picture(self, state: TrainState, text: Any, reference: np.ndarray, text_gain: float | None) -> np.ndarray:
        constants, frozen = self._run.constants, self._run.frozen
        family, options, prompt = constants.family, self._options, None
        if text_gain is not None and isinstance(constants.adapter, DynaIPConfig):
            pixels = images.clip_pixels(reference, family.config("clip_vision").image_size)[None, None]
            options = dataclasses.replace(options, text_gain=text_gain)
            gains = adapter_options(options)
            prompt, _ = make_image_prompt(
                family, constants.adapter, frozen["clip_vision"], state.ema["adapter"], pixels, gains
            )
        weights = Arranged(state.ema.get("transformer", frozen.get("transformer")))
        parts = Parts(family, weights, frozen["vae"])
        decoded = generate(parts, Conditions(text, prompt), self._noise, options).pictures
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            decoded = multihost_utils.process_allgather(decoded, tiled=True)
        return np.asarray(decoded[0])


def _prompts_and_references(sample: SampleConfig, dataset: Dataset) -> tuple[list[str], list[np.ndarray]]:
    """As the config names them, or from the dataset's first rows."""
    if sample.prompts and sample.references and len(sample.prompts) != len(sample.references):
        raise UserError(
            f"`sample.prompts`: {len(sample.prompts)} for {len(sample.references)} `sample.references`; give one a prompt"
        )
    count = len(sample.prompts) or len(sample.references) or min(sample.rows, len(dataset))
    rows = [dataset[n % len(dataset)] for n in range(count)]
    prompts = list(sample.prompts) or [row.caption for row in rows]
    if sample.references:
        return prompts, [images.load_image(path) for path in sample.references]
    return prompts, [pictures(row, f"row {row.number}", False)[1] for row in rows]
