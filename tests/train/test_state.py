"""The state before training, and its average."""

import dataclasses

import jax
import numpy as np

from dynaip_jax.models.flux import Flux
from tests.train.runs import STEP
from train.run import Run
from train.state import fresh_params


def test_a_fresh_base_starts_with_closed_gates(config):
    """adaLN-Zero: the velocity is 0 whatever goes in, and a loss of about 2 (noise and latents of unit size) is the first one."""
    fresh = dataclasses.replace(config, trainable="base", fresh_base=True)
    constants = Run(fresh).constants
    params = fresh_params(fresh, constants)["transformer"]
    flux = constants.family.module("transformer")
    keys = iter(jax.random.split(jax.random.key(0), 9))
    inputs = {k: jax.random.normal(next(keys), v.shape) for k, v in Flux.inputs_spec(flux.config).items()}
    assert (flux.apply({"params": params}, **inputs) == 0).all()


def test_average_warms_up(setup):
    constants, frozen, state, features = setup
    after, _ = STEP(constants, state, frozen, features)
    expected = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * new, state.ema, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.ema, expected)
