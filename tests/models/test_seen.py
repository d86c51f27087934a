"""What blocks keep of their injections: it is what they computed, and where nobody asks, nothing is kept or computed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynaip_jax.choices import MERGES
from dynaip_jax.layers.basic import SEEN
from dynaip_jax.layers.injection import Injection, reference_weights
from dynaip_jax.types import KV, ImagePrompt
from tests.models.backbones import BACKBONES, B, I, M, S, T, normal


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request):
    return BACKBONES[request.param]


@pytest.fixture(scope="module")
def inputs(backbone):
    return backbone.inputs() | dict(timesteps=jnp.array([0.3, 0.8]))


@pytest.fixture(scope="module")
def params(backbone, inputs):
    return jax.jit(backbone.network(backbone.config).init)(jax.random.key(0), **inputs)


def prompt(config, **places):
    """Of two subjects, in all blocks, with gains that differ."""
    heads = config.num_heads, config.head_dim
    banks = [
        KV(*(normal(seed + k, depth, B, S, M, *heads) for k in range(2)))
        for seed, depth in ((0, config.depth), (7, config.depth_single_blocks))
    ]
    gains = [jax.random.uniform(jax.random.key(n), (config.depth + config.depth_single_blocks, B, S)) for n in (3, 4)]
    return ImagePrompt(*banks, *gains, **dict(region=None) | places)


@pytest.mark.parametrize(("merge", "place"), zip(MERGES, ["found", "given"], strict=True))
def test_rows_sum_to_one_and_maps_times_values_are_the_term(backbone, inputs, params, merge, place):
    words = jax.nn.one_hot(jnp.array([[1, 5]]), T)
    region = jax.nn.softmax(normal(9, B, S, I), axis=1)
    given = prompt(backbone.config, **(dict(region=region) if place == "given" else dict(words=words, region=None)))
    network = backbone.network(backbone.config, injection=Injection(merge=merge))
    _, state = jax.jit(lambda p: network.apply(p, **inputs, image_prompt=given, mutable=[SEEN]))(params)
    gains = dict(double_blocks=slice(0, backbone.config.depth), single_blocks=slice(backbone.config.depth, None))
    for name, bank in (("double_blocks", given.double), ("single_blocks", given.single)):
        (seen,) = state[SEEN][name]["injection"]
        for n, k, v in zip(range(len(bank.k)), *bank, strict=True):
            weights = reference_weights(seen.query[n], k, merge)
            whole = weights.sum(axis=(-2, -1)) if merge == "concat" else weights.sum(axis=-1)
            np.testing.assert_allclose(whole, 1, atol=1e-5)
            term = jnp.einsum("bhnsm,bns,bsmhd->bnhd", weights, seen.gain[n], v)
            np.testing.assert_allclose(term, seen.term[n], atol=1e-5)
            assert np.abs(seen.term[n]).max() > 0.1
            image, text = (np.asarray(g[gains[name]][n]) for g in (given.image_gain, given.text_gain))
            np.testing.assert_allclose(seen.gain[n][:, :T], np.repeat(text[:, None], T, 1), rtol=1e-6)
            places = image[:, None] * np.moveaxis(np.asarray(seen.region[n]), 1, 2)
            np.testing.assert_allclose(seen.gain[n][:, T : T + I], places, rtol=1e-5)
            np.testing.assert_allclose(seen.region[n].sum(axis=1), 1, atol=1e-5)


def test_a_forward_that_nobody_looks_into_is_the_same_program(backbone, inputs, params, monkeypatch):
    network, given = backbone.network(backbone.config), prompt(backbone.config)

    def program():
        return str(jax.make_jaxpr(lambda p: network.apply(p, **inputs, image_prompt=given))(params))

    usual = program()
    monkeypatch.setattr(nn.Module, "sow", lambda *_, **__: False)
    assert program() == usual
