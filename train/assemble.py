"""The models of a run on its mesh: the frozen base, the fresh trained state, and the recipe of a step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dynaip_jax.adapters.dynaip import DynaIPConfig, init_adapter_params
from dynaip_jax.errors import UserError
from dynaip_jax.families.registry import family_of
from dynaip_jax.families.registry import open_bundle as open_bundle_
from dynaip_jax.families.tokenizers import Tokenizers
from dynaip_jax.layers.compute import Compute
from dynaip_jax.runtime.compiling import QUICK
from dynaip_jax.runtime.sharding import abstract, batch_sharding, shardings
from dynaip_jax.shapeland import default
from dynaip_jax.storage.bundle import Bundle
from train.config import TrainConfig
from train.step import Recipe, TrainState, features_of, init_state, train_step

ENCODERS = ("vae", "t5", "clip_text", "clip_vision")


class Models(NamedTuple):
    """`frozen`: component -> parameters that are not trained, on the mesh; `state_shardings`: of a `TrainState`."""

    bundle: Bundle
    recipe: Recipe
    tokenizers: Tokenizers
    frozen: dict[str, Any]
    state_shardings: TrainState


def open_bundle(config: TrainConfig) -> Bundle:
    """The base model's folder. Raises `UserError` if it is not one."""
    return open_bundle_(config.bundle or default.paths()[0])


def make_recipe(config: TrainConfig, bundle: Bundle) -> Recipe:
    """The constants of a training step. Raises `UserError` if the adapter asked for does not fit the bundle."""
    kind = jnp.dtype(config.dtype)
    family = family_of(bundle, Compute(dtype=kind, param_dtype=kind), reference=config.trainable != "base")
    trained = jnp.float32 if config.trainable != "adapter" else kind
    family = family.with_compute("transformer", remat=config.remat, param_dtype=trained)
    adapter = None
    if config.trainable != "base":
        vision = family.config("clip_vision")
        if max(config.adapter.levels) > vision.num_hidden_layers:
            raise UserError(
                f"--adapter.levels {config.adapter.levels}: the CLIP of {bundle.path} has {vision.num_hidden_layers} layers; "
                "choose three of 1 to that"
            )
        if config.data.clip_size != vision.image_size:
            raise UserError(
                f"--data.clip-size {config.data.clip_size}: the CLIP of {bundle.path} takes {vision.image_size} pixels; "
                "set it to that"
            )
        choices = dataclasses.asdict(config.adapter)
        own = {name: choices.pop(name) for name in ("blocks", "query", "merge")}
        adapter = DynaIPConfig.for_base(family.sites, vision.hidden_size, hmoe=choices, **own)
        family = family.with_injection(adapter.injection)
    return Recipe(
        family=family,
        adapter=adapter,
        adapter_compute=Compute(dtype=kind, param_dtype=jnp.float32),
        optim=config.optim,
        accumulate=config.accumulate,
        guidance=config.guidance,
        random_granularity=config.random_granularity,
        time_mean=config.time_mean,
        time_std=config.time_std,
        fixed_noise=config.fixed_noise,
        seed=config.seed,
    )


def encoder_identity(bundle: Bundle, config: TrainConfig) -> str:
    """A digest of the frozen encoders and of what is taken from them: what cached features depend on."""
    parts = {name: bundle.manifest["components"].get(name) for name in ENCODERS}
    levels = None if config.trainable == "base" else config.adapter.levels
    facts = dict(parts=parts, levels=levels, text=bundle.manifest["text"])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def load(config: TrainConfig, bundle: Bundle, mesh: Mesh, *, encoders: bool = True, transformer: bool = True) -> Models:
    """Reads what stays frozen straight onto the mesh: the `encoders`, and the `transformer` unless it is trained."""
    recipe = make_recipe(config, bundle)
    wanted = [
        *(ENCODERS if encoders else ()),
        *(["transformer"] if transformer and config.trainable == "adapter" else ()),
    ]
    names = [name for name, _ in recipe.family.configs if name in wanted]
    frozen = {
        name: bundle.load(name, abstract(recipe.family.abstract_params(name, boxed=True), mesh)) for name in names
    }
    tokenizers = recipe.family.load_tokenizers(bundle.path / "tokenizers")
    return Models(bundle, recipe, tokenizers, frozen, state_shardings(config, recipe, mesh))


def step_functions(mesh: Mesh, state_shardings: TrainState) -> tuple[Any, Any]:
    """`features_of` and `train_step`, jitted for a mesh; to be called, or lowered, with the mesh set (`jax.set_mesh`)."""
    features_fn = jax.jit(features_of, static_argnums=0, out_shardings=batch_sharding(mesh), compiler_options=QUICK)
    step_fn = jax.jit(train_step, static_argnums=0, donate_argnums=1, out_shardings=(state_shardings, replicated(mesh)))
    return features_fn, step_fn


def state_shardings(config: TrainConfig, recipe: Recipe, mesh: Mesh) -> TrainState:
    """Where each array of the trained state lies."""
    boxed = jax.eval_shape(lambda: init_state(config.optim, fresh_params(config, recipe, boxed=True)))
    return shardings(boxed, mesh)


def fresh_state(config: TrainConfig, models: Models) -> TrainState:
    """The state before the first step, made sharded: no parameter is ever whole on one device."""
    init = jax.jit(
        lambda: init_state(config.optim, fresh_params(config, models.recipe)), out_shardings=models.state_shardings
    )
    state = init()
    if config.trainable != "adapter" and not config.fresh_base:
        place = models.state_shardings.params["transformer"]
        target = models.recipe.family.abstract_params("transformer")
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s), target, place)
        base = models.bundle.load("transformer", target)
        state = state._replace(
            params=state.params | dict(transformer=base), ema=state.ema | dict(transformer=jax.tree.map(jnp.copy, base))
        )
    return state


def fresh_params(config: TrainConfig, recipe: Recipe, *, boxed: bool = False) -> dict[str, Any]:
    """Fresh trained parameters, float32."""
    adapter_key, base_key = jax.random.split(jax.random.key(config.seed))
    params = {}
    if recipe.adapter is not None:
        params["adapter"] = init_adapter_params(recipe.adapter, adapter_key, recipe.adapter_compute, boxed=boxed)
    if config.trainable != "adapter":
        params["transformer"] = recipe.family.fresh(recipe.family.init_params("transformer", base_key, boxed=boxed))
    return params


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
