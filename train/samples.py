"""The grid drawn while training: what the averaged weights make of fixed prompts, references and noise."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dynaip_jax import images
from dynaip_jax.adapters.dynaip import DynaIP, DynaIPConfig
from dynaip_jax.data.records import Dataset
from dynaip_jax.data.samples import pictures
from dynaip_jax.errors import UserError
from dynaip_jax.families.base import REFERENCE_ENCODER, Family
from dynaip_jax.runtime.layouts import Arranged
from dynaip_jax.runtime.programs import Quick
from dynaip_jax.sampling.conditions import Conditions, adapter_options, encode_text
from dynaip_jax.sampling.denoise import Parts, generate, on_mesh
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.types import ImagePrompt
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
        text_encoders = run.held(*family.text_encoders)
        self._options = _options(config.sample, run.bundle.manifest["defaults"], family)
        negative = self._options.negative_prompt
        texts = self._prompts + ([] if negative is None else [negative])
        self._text = encode_text(family, text_encoders, run.tokenizers.ids(texts))
        del text_encoders
        self._levels = self._seen() if isinstance(constants.adapter, DynaIPConfig) else None
        self._vae = run.held("vae")["vae"]
        latent = family.latent(config.sample.size, config.sample.size)
        self._noise = np.asarray(jax.random.normal(jax.random.key(config.seed), (1, *latent)))

    def _seen(self) -> tuple[jax.Array, ...]:
        """CLIP's hidden states of the references, each `[n, 1, m, c]`: they do not change while the adapter is trained."""
        family, adapter = self._run.constants.family, self._run.constants.adapter
        assert adapter is not None
        size = family.config(REFERENCE_ENCODER).image_size
        pixels = np.stack([images.clip_pixels(reference, size) for reference in self._references])
        vision = Quick(family.vision, static_argnums=2)
        levels = vision(self._run.held(REFERENCE_ENCODER)[REFERENCE_ENCODER], pixels, adapter.hmoe.levels)
        return tuple(level[:, None] for level in levels)

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        """Draws the grid with the averaged weights of `state`; process 0 writes it. No figures."""
        columns = {label: self._pictures(state, text_gain) for label, text_gain in COLUMNS.items()}
        cells = []
        for number, reference in enumerate(self._references):
            cells.append(images.labelled(images.square(reference), "reference", self._cell))
            for label, column in columns.items():
                cells.append(images.labelled(images.to_uint8(column[number]), label, self._cell))
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

    def _pictures(self, state: TrainState, text_gain: float | None) -> np.ndarray:
        """A column, float32 `[n, H, W, 3]`: as many pictures at once as the mesh has parts of a batch, each from the same noise."""
        constants, mesh = self._run.constants, self._run.mesh
        weights = Arranged(state.ema.get("transformer", self._run.frozen.get("transformer")))
        parts = Parts(constants.family, weights, self._vae, mesh if mesh.size > 1 else None)
        together, count = mesh.shape["data"] * mesh.shape["fsdp"], len(self._prompts)
        drawn = []
        for start in range(0, count, together):
            rows = np.resize(np.arange(start, min(start + together, count)), together)
            guided = self._options.true_cfg is not None
            lines = np.concatenate([rows, np.full(together if guided else 0, count)])  # the negative prompt comes last
            text = jax.tree.map(lambda x, lines=lines: x[lines], self._text)
            levels = jax.tree.map(lambda x, rows=rows: x[rows], self._levels)
            options, prompt = self._options, None
            if text_gain is not None and levels is not None:
                options = dataclasses.replace(options, text_gain=text_gain)
                with on_mesh(parts.mesh):
                    prompt = _image_prompt(
                        constants.family, constants.adapter, state.ema["adapter"], levels, adapter_options(options)
                    )
            decoded = generate(
                parts, Conditions(text, prompt), np.repeat(self._noise, together, axis=0), options
            ).pictures
            if jax.process_count() > 1:
                from jax.experimental import multihost_utils

                decoded = multihost_utils.process_allgather(decoded, tiled=True)
            drawn.append(np.asarray(decoded)[: count - start])
        return np.concatenate(drawn)


def _options(sample: SampleConfig, defaults: Mapping[str, Any], family: Family) -> SampleOptions:
    """How the grid's pictures are made: as the config says, and with true CFG where the model asks for it."""
    guidance = sample.guidance if family.takes_guidance else None
    asked = SampleOptions(steps=sample.steps, guidance=guidance, height=sample.size, width=sample.size)
    return asked.filled(defaults, multiple=family.multiple, takes_guidance=family.takes_guidance)


@partial(Quick, static_argnums=(0, 1))
def _image_prompt(
    family: Family, config: DynaIPConfig, params: Any, levels: Any, options: dict[str, Any]
) -> ImagePrompt:
    """The image prompt of CLIP's `levels`, computed as the pipeline does."""
    adapter: Any = DynaIP(config, family.compute(REFERENCE_ENCODER))
    return adapter.apply({"params": params}, levels, **options)[0]


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
