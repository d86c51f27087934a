"""What training changes: parameters, their average, the optimizer's state, and where each array lies on the mesh."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dynaip_jax.adapters.dynaip import init_adapter_params
from dynaip_jax.families.base import Matrices
from dynaip_jax.layers.basic import shapes_of
from dynaip_jax.runtime.sharding import shardings
from train.config import OptimConfig, TrainConfig
from train.constants import Constants
from train.optim import optimizer


class TrainState(NamedTuple):
    """All that changes in training. `params` has "adapter", "transformer" or both, float32; `ema` its average."""

    step: jax.Array  # int32, steps done
    params: dict[str, Any]
    ema: dict[str, Any]
    opt_state: Any


def init_state(optim: OptimConfig, params: dict[str, Any], matrices: Sequence[Matrices] = ()) -> TrainState:
    """The state before the first step; `matrices`: see `optimizer`."""
    opt_state = optimizer(optim, (), matrices).init(params)  # weight decay keeps no state
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), opt_state)


def updated(
    optim: OptimConfig, state: TrainState, grads: Any, decayed: Collection[str], matrices: Sequence[Matrices] = ()
) -> TrainState:
    """The state after one optimizer step along `grads`; `decayed`, `matrices`: see `optimizer`.

    The average is written out: `optax.incremental_update` multiplies the old one by 1 - (1 - decay), which for a decay below a
    half, as in the first steps, is another float32 number.
    """
    updates, opt_state = optimizer(optim, decayed, matrices).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    done = state.step.astype(jnp.float32)
    decay = jnp.minimum(optim.ema, (1 + done) / (10 + done))
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
    return TrainState(state.step + 1, params, ema, opt_state)


def fresh_params(config: TrainConfig, constants: Constants, *, boxed: bool = False) -> dict[str, Any]:
    """Fresh trained parameters, float32; `boxed` leaves each in the box that holds its logical axis names."""
    adapter_key, base_key = jax.random.split(jax.random.key(config.seed))
    params = {}
    if constants.adapter is not None:
        params["adapter"] = init_adapter_params(constants.adapter, adapter_key, constants.adapter_compute, boxed=boxed)
    if config.trainable != "adapter":
        params["transformer"] = constants.family.fresh(
            constants.family.init_params("transformer", base_key, boxed=boxed)
        )
    return params


def first_state(config: TrainConfig, constants: Constants, boxed: bool = False) -> TrainState:
    """The state before the first step; `boxed`: see `fresh_params`."""
    return init_state(config.optim, fresh_params(config, constants, boxed=boxed), constants.matrices)


@lru_cache(maxsize=8)
def _abstract_boxed(config: TrainConfig, constants: Constants) -> TrainState:
    """Kept: to find the shapes of a network's parameters is to trace all of it."""
    return shapes_of(lambda: first_state(config, constants, boxed=True))


def state_shardings(config: TrainConfig, constants: Constants, mesh: Mesh) -> TrainState:
    """Where each array of the state lies."""
    return shardings(_abstract_boxed(config, constants), mesh)


def abstract_state(config: TrainConfig, constants: Constants, places: Any) -> TrainState:
    """Shapes and dtypes of the state, with the shardings `places`: a tree of them, or one for all."""
    shapes = nn.meta.unbox(_abstract_boxed(config, constants))
    if not isinstance(places, TrainState):
        places = jax.tree.map(lambda _: places, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


def fresh_state(config: TrainConfig, constants: Constants, places: TrainState, base: Any = None) -> TrainState:
    """The state before the first step, made sharded: no parameter is ever whole on one device. `base`: the transformer to start
    from, in place of a fresh one."""
    state = jax.jit(first_state, static_argnums=(0, 1), out_shardings=places)(config, constants)
    return state if base is None else started_from(state, transformer=base)


def started_from(state: TrainState, **parts: Any) -> TrainState:
    """A state before the first step with other parameters for some `parts`, which their averages start from too."""
    return state._replace(params=state.params | parts, ema=state.ema | jax.tree.map(jnp.copy, parts))
