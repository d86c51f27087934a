"""HMoE and DynaIP: routing, granularity, the bank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynaip_jax.adapters.dynaip import DynaIP, DynaIPConfig, init_adapter_params
from dynaip_jax.adapters.hmoe import Expert, HMoE, HMoEConfig
from dynaip_jax.models.flux import Flux, FluxConfig
from dynaip_jax.testing import tiny_family

TINY = HMoEConfig(clip_width=12, levels=(1, 2, 3), expert_width=24, width=16, resampler_heads=2)
FEATURES = [jax.random.normal(jax.random.key(i), (2, 5, 12)) for i in range(3)]


def random_params(module, *args, seed=0):
    params = module.init(jax.random.key(seed), *args)["params"]
    return {"params": jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.3, params)}


def hmoe(**changes):
    config = HMoEConfig(**{**vars(TINY), **changes})
    module = HMoE(config)
    params = random_params(module, FEATURES)
    return config, params, lambda g=None: module.apply(params, FEATURES, g)


@pytest.mark.parametrize(("router", "shape"), [("image", (2, 3)), ("token", (2, 5, 3))])
def test_tokens_are_the_experts_mixed_by_the_weights_returned(router, shape):
    config, params, run = hmoe(router=router)
    tokens, weights = run()
    assert weights.shape == shape and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert float(weights.std()) > 1e-3
    experts = [
        Expert(config).apply({"params": params["params"][f"expert_{n}"]}, f)
        for n, f in zip(("low", "mid", "high"), FEATURES, strict=True)
    ]
    mixed = sum(jnp.broadcast_to(weights.reshape(2, -1, 3), (2, 5, 3))[..., i, None] * e for i, e in enumerate(experts))
    np.testing.assert_allclose(tokens, mixed, atol=1e-5)


@pytest.mark.parametrize("router", ["image", "token"])
def test_granularity_replaces_the_router_and_is_normalised(router):
    _, _, run = hmoe(router=router)
    tokens, weights = run(jnp.array([[0.0, 1.0, 3.0]]))
    np.testing.assert_allclose(weights, np.broadcast_to([0, 0.25, 0.75], weights.shape), atol=1e-6)
    _, own = run()
    same, _ = run(own * 7) if router == "image" else (run()[0], None)
    np.testing.assert_allclose(same, run()[0], atol=1e-5)
    assert float(jnp.abs(tokens - run()[0]).max()) > 1e-3


@pytest.mark.parametrize("router", ["image", "token"])
def test_the_router_decides_where_granularity_is_all_zeros(router):
    _, _, run = hmoe(router=router)
    asked = jnp.array([[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]])[: len(FEATURES[0])]
    weights, own = run(asked)[1], run()[1]
    np.testing.assert_allclose(weights[0], np.broadcast_to([0, 0.25, 0.75], weights[0].shape), atol=1e-6)
    np.testing.assert_array_equal(weights[1], own[1])


def test_only_the_chosen_level_matters_at_the_end_of_the_scale():
    module, params = HMoE(TINY), None
    params = random_params(module, FEATURES)
    high = jnp.array([[0.0, 0.0, 1.0]])
    changed = [FEATURES[0] + 1, FEATURES[1] * 2, FEATURES[2]]
    np.testing.assert_array_equal(module.apply(params, FEATURES, high)[0], module.apply(params, changed, high)[0])


def test_resampler_gives_the_tokens_asked_for_and_reads_all_of_them():
    _, params, run = hmoe(resampler_tokens=4)
    tokens, _ = run()
    assert tokens.shape == (2, 4, 16)
    grad = jax.grad(lambda f: HMoE(HMoEConfig(**{**vars(TINY), "resampler_tokens": 4})).apply(params, f)[0].sum())(
        FEATURES
    )
    assert all(float(jnp.abs(g).max(axis=-1).min()) > 0 for g in grad)


def test_bad_settings_are_refused_in_words():
    for changes, message in (
        (dict(levels=(1, 2)), "three CLIP layers"),
        (dict(router="pixel"), "'image' or 'token'"),
        (dict(resampler_tokens=2, resampler_heads=3), "multiple of resampler_heads"),
    ):
        with pytest.raises(ValueError, match=message):
            HMoEConfig(**{**vars(TINY), **changes})
    with pytest.raises(ValueError, match="blocks 'some'"):
        DynaIPConfig(blocks="some")
    for name in ("query", "merge"):
        with pytest.raises(ValueError, match=f"{name} 'some': expected one of"):
            DynaIPConfig(**{name: "some"})
    with pytest.raises(ValueError, match=r"three arrays \[b, m, 12\]"):
        HMoE(TINY).init(jax.random.key(0), [f[..., :6] for f in FEATURES])


TRANSFORMER = FluxConfig.tiny()
BASE = tiny_family(transformer=TRANSFORMER).sites
SUBJECTS = [jnp.stack([f, jnp.sin(f), -f], axis=1) for f in FEATURES]  # [b=2, s=3, m, c]


@pytest.mark.parametrize(("blocks", "injected"), [("double", 2), ("all", 4)])
def test_bank_shapes_gains_and_a_fresh_adapter(blocks, injected):
    config = DynaIPConfig.for_base(BASE, 12, hmoe=dict(levels=(1, 2, 3), expert_width=24), blocks=blocks)
    params = init_adapter_params(config, jax.random.key(0))
    prompt, weights = DynaIP(config).apply(
        {"params": params}, SUBJECTS, image_gain=jnp.array([1.0, 0.5, 0.0]), text_gain=0.25
    )
    assert weights.shape == (2, 3, 3)
    assert prompt.double.k.shape == (2, 2, 3, 5, BASE.heads, BASE.head_dim)
    assert (prompt.single is None) == (blocks == "double")
    np.testing.assert_array_equal(prompt.image_gain, np.broadcast_to([1.0, 0.5, 0.0], (injected, 2, 3)))
    np.testing.assert_array_equal(prompt.text_gain, np.full((injected, 2, 3), 0.25))
    assert float(jnp.abs(prompt.double.v).max()) == 0
    np.testing.assert_allclose(jnp.mean(prompt.double.k**2, axis=-1), 1, atol=1e-3)


def test_subjects_do_not_mix_in_the_bank():
    config = DynaIPConfig.for_base(BASE, 12, hmoe=dict(levels=(1, 2, 3), expert_width=24))
    params = random_params(DynaIP(config), SUBJECTS)
    run = lambda f: DynaIP(config).apply(params, f)[0].double
    changed = run([f.at[:, 2].set(jnp.cos(3 * f[:, 2])) for f in SUBJECTS])
    for before, after in zip(run(SUBJECTS), changed, strict=True):
        np.testing.assert_allclose(after[:, :, :2], before[:, :, :2], atol=1e-6)
        assert float(jnp.abs(after[:, :, 2] - before[:, :, 2]).max()) > 1e-3


def test_a_fresh_adapter_learns_through_its_values():
    """W_v = 0 must not stop the gradient: dL/dW_v is not zero, in any block."""
    config = DynaIPConfig.for_base(BASE, 12, hmoe=dict(levels=(1, 2, 3), expert_width=24), blocks="all")
    params = init_adapter_params(config, jax.random.key(0))
    x = {
        k: jax.random.normal(jax.random.key(i), s.shape)
        for i, (k, s) in enumerate(Flux.inputs_spec(TRANSFORMER, 2).items())
    }
    base = Flux(TRANSFORMER).init(jax.random.key(1), **x)

    def loss(p):
        prompt, _ = DynaIP(config).apply({"params": p}, SUBJECTS)
        return jnp.mean(Flux(TRANSFORMER).apply(base, **x, image_prompt=prompt) ** 2)

    grads = jax.grad(loss)(params)
    for kind in ("double", "single"):
        per_block = jnp.abs(grads[kind]["value"]).reshape(2, -1).max(axis=1)
        assert float(per_block.min()) > 0
