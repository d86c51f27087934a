"""The training loop of Shapeland's small networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.shapeland.fit import fit


def test_a_loop_that_was_cut_off_goes_on(tmp_path):
    def loss(params, batch, key):
        value = jnp.square(params["x"] - batch + 0.1 * jax.random.normal(key, (3,))).mean()
        return value, dict(twice=2 * value)

    def train(folder, cut=None):
        def batch_of(step):
            if step == cut:
                raise InterruptedError
            return jnp.full(3, step)

        return fit(tmp_path / folder, dict(x=jnp.zeros(3)), loss, batch_of, 500, 0.01, seed=0)

    straight = train("straight")
    with pytest.raises(InterruptedError):
        train("cut", cut=300)
    np.testing.assert_array_equal(train("cut")["x"], straight["x"])
