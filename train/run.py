"""A run and all that it is made of, each part opened once."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from dynaip_jax.adapters.dynaip import DynaIPConfig
from dynaip_jax.data.loader import make_loader
from dynaip_jax.data.records import Dataset
from dynaip_jax.errors import UserError
from dynaip_jax.families.base import REFERENCE_ENCODER, Family
from dynaip_jax.families.registry import family_of, open_bundle
from dynaip_jax.families.tokenizers import Tokenizers
from dynaip_jax.layers.compute import Compute
from dynaip_jax.planner import flops
from dynaip_jax.runtime.sharding import abstract, batch_positions, batch_sharding, make_mesh
from dynaip_jax.shapeland import default
from dynaip_jax.storage.adapter import read_adapter_manifest, read_adapter_weights
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.storage.codec import from_dict
from train.checkpoint import Checkpoints
from train.config import TrainConfig, differing
from train.constants import Constants
from train.evaluators import Due
from train.state import TrainState, abstract_state, fresh_state, started_from, state_shardings
from train.step import jitted


class Run:
    """A training run. Its parts are opened when they are first asked for, and then stay: the loop needs all of them; caching
    features, exporting and planning some. Errors of a part (`UserError`) come when it is opened.

    `bundle`, `mesh`: in place of those that the config names.
    """

    def __init__(
        self,
        config: TrainConfig,
        workdir: epath.PathLike = "",
        *,
        bundle: Bundle | None = None,
        mesh: Mesh | None = None,
    ):
        self.config, self.workdir = config, epath.Path(workdir)
        self._bundle, self._mesh = bundle, mesh
        self.evaluators: list[Due] = []
        self._close = contextlib.ExitStack()

    def close(self) -> None:
        """Ends the workers and threads of the parts that have some."""
        self._close.close()

    # --- what is trained, and on what

    @cached_property
    def mesh(self) -> Mesh:
        """All devices of all processes."""
        return self._mesh or make_mesh(self.config.mesh)

    @cached_property
    def bundle(self) -> Bundle:
        """The base model's folder."""
        return self._bundle or open_bundle(self.config.bundle or default.paths()[0])

    @cached_property
    def constants(self) -> Constants:
        """The constants of a training step. The adapter asked for must fit the bundle."""
        return make_constants(self.config, self.bundle)

    @cached_property
    def tokenizers(self) -> Tokenizers:
        return self.constants.family.load_tokenizers(self.bundle.part("tokenizers"))

    @property
    def encoders(self) -> tuple[str, ...]:
        """Components that make features and are never trained."""
        return tuple(name for name, _ in self.constants.family.configs if name != "transformer")

    @cached_property
    def encoder_identity(self) -> str:
        """A digest of the frozen encoders and of what is taken from them: what cached features depend on."""
        names = [name for name in self.constants.family.components if name != "transformer"]
        parts = {name: self.bundle.manifest["components"].get(name) for name in names}
        levels = None if self.config.trainable == "base" else self.config.adapter.levels
        facts = dict(parts=parts, levels=levels, text=self.bundle.manifest["text"])
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def identity(self) -> dict[str, str]:
        """What a run is made of, by content: "base", "encoders" and "data". "data" is empty for a dataset without a digest."""
        return dict(base=self.bundle.fingerprint, encoders=self.encoder_identity, data=self.dataset.content)

    def flops(self, image_rows: int) -> int:
        """FLOPs of a training step on one sample of `image_rows` tokens."""
        constants, base_trained = self.constants, self.config.trainable != "adapter"
        return flops.training_step(constants.family, constants.adapter, image_rows, base_trained=base_trained)

    # --- frozen weights

    def abstract(self, name: str) -> Any:
        """Shapes, dtypes and shardings of a frozen component."""
        return abstract(self.constants.family.abstract_params(name, boxed=True), self.mesh)

    def load(self, *names: str) -> dict[str, Any]:
        """Reads components straight onto the mesh."""
        return {name: self.bundle.load(name, self.abstract(name)) for name in names}

    @cached_property
    def frozen(self) -> dict[str, Any]:
        """Component -> parameters that training reads and does not change, on the mesh."""
        base = ("transformer",) if self.config.trainable == "adapter" else ()
        return self.load(*(() if self.config.data.features else self.encoders), *base)

    def held(self, *names: str) -> dict[str, Any]:
        """Frozen components: of `frozen`, or, if training from a cache has no need of them, read now and left to the caller."""
        return {name: self.frozen[name] if name in self.frozen else self.load(name)[name] for name in names}

    @property
    def base(self) -> dict[str, Any]:
        """What of `frozen` a training step is given."""
        return {name: params for name, params in self.frozen.items() if name == "transformer"}

    # --- data

    @cached_property
    def data(self) -> Any:
        """This process's part of each batch, without end."""
        loader = make_loader(
            self.config.data,
            self.tokenizers,
            global_batch=self.config.batch,
            positions=batch_positions(self.mesh, self.config.batch),
            encoders=self.encoder_identity,
        )
        self._close.callback(loader.close)
        return loader

    @property
    def dataset(self) -> Dataset:
        """The rows that are trained on."""
        return self.data.reader.dataset

    def on_mesh(self, local: Any, count: int) -> Any:
        """This process's part of a batch of `count` samples as arrays over the mesh."""
        split = batch_sharding(self.mesh)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x, (count, *x.shape[1:])), local)

    # --- state

    @cached_property
    def places(self) -> TrainState:
        """The sharding of each array of the state."""
        return state_shardings(self.config, self.constants, self.mesh)

    @cached_property
    def programs(self) -> tuple[Any, Any]:
        """`features_of` and `train_step`, jitted."""
        return jitted(self.mesh, self.places)

    @cached_property
    def checkpoints(self) -> Checkpoints:
        checkpoints = Checkpoints(self.workdir, self.config.keep)
        self._close.callback(checkpoints.close)
        return checkpoints

    @cached_property
    def first_adapter(self) -> dict[str, Any] | None:
        """`adapter.json` of the adapter to start from; None for random weights. It must be of the base and form that the config asks for."""
        path = self.config.init_adapter
        if not path:
            return None
        manifest = read_adapter_manifest(path, base=self.bundle, field="init_adapter")
        try:
            differences = differing(from_dict(DynaIPConfig, manifest["config"]), self.constants.adapter)
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"`init_adapter` {path}: its config cannot be read ({e}); export the adapter again") from e
        if differences:
            raise UserError(
                f"`init_adapter` {path}: made otherwise than this run asks for ({'; '.join(differences)}); set the recipe's `adapter` to that, "
                "or start from another"
            )
        return manifest

    def fresh_state(self) -> TrainState:
        """The state before the first step."""
        base = None
        if self.config.trainable != "adapter" and not self.config.fresh_base:
            target = self.constants.family.abstract_params("transformer")
            place = self.places.params["transformer"]
            target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s), target, place)
            base = self.bundle.load("transformer", target)
        state = fresh_state(self.config, self.constants, self.places, base)
        if self.first_adapter is None:
            return state
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state.params["adapter"],
            self.places.params["adapter"],
        )
        return started_from(state, adapter=read_adapter_weights(self.config.init_adapter, target))

    def first_state(self) -> tuple[TrainState, int]:
        """The state to go on from, and how many steps it has done: the latest checkpoint, which also sets `data`, or a fresh one."""
        step = self.checkpoints.latest()
        if step is None:
            return self.fresh_state(), 0
        target = abstract_state(self.config, self.constants, self.places)
        state = self.checkpoints.restore(step, target, self.data)
        if self.config.fixed_batch:
            self.data.set_state(self.data.get_state() | dict(step=0))
        return state, step

    def check_batch(self) -> None:
        """Raises `UserError` if the mesh does not divide the batch."""
        config, ways = self.config, self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        each = config.batch // config.accumulate
        if each % ways:
            raise UserError(
                f"`batch` {config.batch} in {config.accumulate} micro-batches of {each}: not divisible by the mesh's data x fsdp = "
                f"{ways}; choose a multiple of {ways * config.accumulate}"
            )


def make_constants(config: TrainConfig, bundle: Bundle) -> Constants:
    """The constants of a training step. Raises `UserError` if the adapter asked for does not fit the bundle."""
    dtype = jnp.dtype(config.dtype)
    family = family_of(bundle, Compute(dtype=dtype, param_dtype=dtype), reference=config.trainable != "base")
    trained = jnp.float32 if config.trainable != "adapter" else dtype
    family = family.with_compute("transformer", remat=config.remat, param_dtype=trained)
    adapter = None
    if config.trainable != "base":
        adapter = make_adapter(config, family, bundle)
        family = family.with_injection(adapter.injection)
    return Constants(
        family=family,
        adapter=adapter,
        adapter_compute=Compute(dtype=dtype, param_dtype=jnp.float32),
        optim=config.optim,
        accumulate=config.accumulate,
        guidance=config.guidance,
        random_granularity=config.random_granularity,
        time_mean=config.time_mean,
        time_std=config.time_std,
        fixed_noise=config.fixed_noise,
        seed=config.seed,
    )


def make_adapter(config: TrainConfig, family: Family, bundle: Bundle) -> DynaIPConfig:
    """The adapter that `config` asks for, in the sizes of the base. Raises `UserError` if it does not fit `bundle`."""
    vision = family.config(REFERENCE_ENCODER)
    if max(config.adapter.levels) > vision.num_hidden_layers:
        raise UserError(
            f"`adapter.levels` {config.adapter.levels}: the CLIP of {bundle.path} has {vision.num_hidden_layers} layers; "
            "choose three of 1 to that"
        )
    if config.data.clip_size != vision.image_size:
        raise UserError(
            f"`data.clip_size` {config.data.clip_size}: the CLIP of {bundle.path} takes {vision.image_size} pixels; "
            "set it to that"
        )
    choices = dataclasses.asdict(config.adapter)
    own = {name: choices.pop(name) for name in ("blocks", "query", "merge")}
    try:
        return DynaIPConfig.for_base(family.sites, vision.hidden_size, hmoe=choices, **own)
    except ValueError as e:
        raise UserError(f"`adapter`: {e}; choose sizes that fit the base {bundle.path}") from e
