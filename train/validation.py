"""The loss on held-out rows: always the same rows, noise and times, so that two values differ by the weights alone."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp

from dynaip_jax.data.cached import CachedBatch
from dynaip_jax.data.loader import make_loader
from dynaip_jax.data.samples import Batch
from dynaip_jax.runtime.programs import Quick
from dynaip_jax.runtime.sharding import batch_positions, batch_sharding, local_part
from train.run import Run
from train.state import TrainState
from train.step import encode, loss


class Validation:
    """Mean loss of the averaged weights over the first batches of `config.validation.path`, without augmentation or drops.

    The pictures stay in the host's memory; they are encoded anew each time, so that they take none of the devices'. A run that trains
    from a cache has no encoders: it reads them once, and what they make of the pictures stays in the host's memory.
    """

    def __init__(self, run: Run):
        config = run.config
        self._run, self._rows = run, config.batch // config.accumulate
        data = dataclasses.replace(
            config.data, path=config.validation.path, also=(), weights=(), features="", workers=0, crop_reference=1.0, flip_reference=0.0,
            flip_target=0.0, drop_image=0.0, drop_text=0.0, drop_both=0.0,
        )  # fmt: skip
        positions = batch_positions(run.mesh, self._rows)
        loader = make_loader(data, run.tokenizers, global_batch=self._rows, positions=positions)
        with contextlib.closing(loader):
            self._batches = [next(loader) for _ in range(config.validation.batches)]
        if config.data.features:
            self._batches = self._encoded(self._batches)
        self._constants = dataclasses.replace(run.constants, random_granularity=0.0, fixed_noise=False)
        self._loss = jax.jit(lambda constants, params, features: loss(constants, params, features)[0], static_argnums=0)

    def _encoded(self, batches: list[Batch]) -> list[CachedBatch]:
        """What the encoders make of this process's part of each batch."""
        run, constants = self._run, self._run.constants
        encoders = run.held(*run.encoders)
        encode_batch = Quick(encode, static_argnums=0, out_shardings=batch_sharding(run.mesh))
        encoded = []
        for local in batches:
            with jax.set_mesh(run.mesh):
                whole = encode_batch(constants, encoders, run.on_mesh(local, self._rows))
            moments, states, pooled, levels = jax.tree.map(local_part, whole)
            encoded.append(CachedBatch(moments, states, pooled, levels, local.keep_image, local.row))
        return encoded

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        """`validation_loss`."""
        run = self._run
        features_fn, _ = run.programs
        losses = []
        for number, local in enumerate(self._batches):
            batch = run.on_mesh(local, self._rows)
            with jax.set_mesh(run.mesh):
                features = features_fn(self._constants, run.frozen, batch, jnp.int32(number))
                losses.append(float(self._loss(self._constants, run.base | state.ema, features)))
        return dict(validation_loss=sum(losses) / len(losses))
