"""The programs of a recipe, for `dynaip plan`: its training step, or sampling with what it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynaip_jax.data.samples import Batch
from dynaip_jax.errors import UserError
from dynaip_jax.families.registry import published
from dynaip_jax.planner import flops
from dynaip_jax.planner import jobs as plan
from dynaip_jax.runtime.sharding import abstract, batch_sharding
from dynaip_jax.storage.bundle import Bundle
from train import assemble as models
from train.config import TrainConfig
from train.loop import check_batch
from train.step import features_of, init_state


def job(config: TrainConfig, mesh: Mesh, kind: Literal["train", "sample"], **sampling: Any) -> plan.Job:
    """What a recipe asks of `mesh`; `sampling`: more options of `plan.sampling`. A bundle that is not there is planned with the
    published sizes if it is named "flux-dev" or "flux-schnell". Raises `UserError` for a recipe that cannot run on the mesh."""
    name = Path(config.bundle).name
    bundle = None if Path(config.bundle).is_dir() else published(name)
    bundle = bundle or models.open_bundle(config)
    recipe = models.make_recipe(config, bundle)
    if kind == "train":
        return _training(config, bundle, recipe, mesh)
    adapter = recipe.adapter
    if adapter is None:
        raise UserError(f"--job sample: the recipe trains {config.trainable!r}, no adapter; expected one that does")
    return plan.sampling(bundle, adapter, mesh, size=config.sample.size, steps=config.sample.steps, **sampling)


def _training(config: TrainConfig, bundle: Bundle, recipe: Any, mesh: Mesh) -> plan.Job:
    check_batch(config, mesh)
    family = recipe.family
    names = [name for name, _ in family.configs]
    frozen = {
        name: abstract(family.abstract_params(name, boxed=True), mesh)
        for name in names
        if name != "transformer" or config.trainable == "adapter"
    }
    where = models.state_shardings(config, recipe, mesh)
    state = jax.eval_shape(lambda: init_state(config.optim, models.fresh_params(config, recipe)))
    state = jax.tree.map(_placed, state, where)

    side, b = config.data.resolution, config.batch
    clip = config.data.clip_size
    shapes = Batch(
        target=np.zeros((0, side, side, 3), np.float32), reference=np.zeros((0, 1, clip, clip, 3), np.float32),
        ids=family.text_ids_spec(0),
        keep_image=np.zeros(0, np.float32), row=np.zeros(0, np.int32),
    )  # fmt: skip
    split = batch_sharding(mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype, sharding=split), shapes)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    features = jax.eval_shape(lambda f, x, n: features_of(recipe, f, x, n), frozen, batch, step)
    features = jax.tree.map(lambda x: _placed(x, split), features)
    features_fn, step_fn = models.step_functions(mesh, where)

    base = {k: v for k, v in frozen.items() if k == "transformer"}
    encoders = tuple(name for name in frozen if name not in base)
    rows = family.tokens(family.latent(side, side))
    encoding = 2 * family.text_rows * _size(frozen[family.text_encoders[0]])
    if recipe.adapter is not None:
        encoding += 2 * family.config("clip_vision").tokens * _size(frozen["clip_vision"])
    each = flops.training_step(family, recipe.adapter, rows, base_trained=config.trainable != "adapter")
    return plan.Job(
        programs=[
            plan.Program("features", lambda: features_fn.lower(recipe, frozen, batch, step), 1, b * encoding, encoders),
            plan.Program(
                "step", lambda: step_fn.lower(recipe, state, base, features), 1, b * each, (*base, "trained state")
            ),
        ],
        components={name: frozen[name] for name in (*base, *encoders)} | {"trained state": state},
        images=b,
    )


def _placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
