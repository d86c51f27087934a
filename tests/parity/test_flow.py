"""Schedule and Euler step against diffusers' FlowMatchEulerDiscreteScheduler, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from dynaip_jax import flow
from dynaip_jax.layers import packing


def theirs(steps, tokens, dynamic):
    settings = dict(base_image_seq_len=256, max_image_seq_len=4096, base_shift=0.5, max_shift=1.15)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, shift=1.0, **settings)
    mu = calculate_shift(tokens) if dynamic else None
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 9216])
@pytest.mark.parametrize(("steps", "dynamic"), [(28, True), (4, False), (1, True)])
def test_times(tokens, steps, dynamic):
    ours = flow.schedule(steps, tokens, flow.ScheduleConfig(dynamic=dynamic))
    np.testing.assert_allclose(ours, theirs(steps, tokens, dynamic).sigmas.numpy(), atol=1e-6)


def test_shift_at_the_two_anchors():
    config = flow.ScheduleConfig()
    assert config.factor(256) == pytest.approx(np.exp(0.5)) and config.factor(4096) == pytest.approx(np.exp(1.15))


def test_euler_takes_the_schedulers_own_steps():
    scheduler = theirs(6, 300, True)
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    field = lambda x, t: np.sin(3 * x) + t
    ours, _ = flow.euler(lambda x, t, *_: (jnp.sin(3 * x) + t, None), jnp.asarray(x), jnp.asarray(scheduler.sigmas))
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tensor(field(x.numpy(), t.item() / 1000)), t, x).prev_sample
    np.testing.assert_allclose(ours, x, atol=1e-5)


def test_euler_tells_how_far_it_is():
    times = jnp.linspace(1, 0, 5)
    total, _ = flow.euler(lambda x, t, done, _: (-jnp.full_like(x, done), None), jnp.zeros(1), times)
    np.testing.assert_allclose(total, (0 + 0.25 + 0.5 + 0.75) / 4)


def test_packing_is_channel_major_and_has_an_inverse():
    from diffusers import FluxPipeline

    z = np.asarray(jax.random.normal(jax.random.key(0), (2, 16, 6, 10)))
    packed = packing.pack_latents(jnp.asarray(z))
    np.testing.assert_array_equal(packed, FluxPipeline._pack_latents(torch.tensor(z), 2, 16, 6, 10))
    np.testing.assert_array_equal(packing.unpack_latents(packed, 6, 10), z)
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    np.testing.assert_array_equal(packing.image_ids(6, 10)[0], ids)
