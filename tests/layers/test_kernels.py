"""The attention kernels: they compute one thing, and the right one is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.layers import kernels
from dynaip_jax.layers.attention import attention

NAMES = ("query", "key", "value")


def arrays(n, m, d=128, dtype=jnp.float32, heads=2, batch=2):
    keys = jax.random.split(jax.random.key(n + m), 3)
    return [jax.random.normal(k, (batch, rows, heads, d), dtype) for k, rows in zip(keys, (n, m, m), strict=True)]


@pytest.mark.parametrize("n, m", [(256, 256), (200, 300)], ids=["whole blocks", "padded"])
def test_splash_is_attention(n, m):
    """Pallas' interpreter; seen: 2e-6 in outputs, 5e-6 in gradients."""
    q, k, v = arrays(n, m)
    scale = 128**-0.5

    def run(kernel):
        return lambda q, k, v: (kernel(q, k, v, scale) * jnp.cos(jnp.arange(128))).sum()

    splash = lambda *x: kernels.splash(*x, interpret=True)
    np.testing.assert_allclose(splash(q, k, v, scale), kernels.xla(q, k, v, scale), atol=2e-5)
    found, expected = (jax.grad(run(kernel), (0, 1, 2))(q, k, v) for kernel in (splash, kernels.xla))
    for name, a, b in zip(NAMES, found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)


def test_splash_in_bfloat16_is_as_near_as_xla():
    q, k, v = arrays(256, 384, dtype=jnp.bfloat16)
    exact = kernels.xla(*(x.astype(jnp.float32) for x in (q, k, v)), 128**-0.5)
    error, usual = (
        float(jnp.abs(found.astype(jnp.float32) - exact).mean())
        for found in (kernels.splash(q, k, v, 128**-0.5, interpret=True), kernels.xla(q, k, v, 128**-0.5))
    )
    assert error < 2 * usual


def test_one_head_at_a_time_is_the_same():
    q, k, v = arrays(40, 50, 16)
    bias = jax.random.normal(jax.random.key(0), (1, 2, 40, 50))
    for extra in (None, bias):
        np.testing.assert_allclose(kernels.per_head(q, k, v, 0.3, extra), kernels.xla(q, k, v, 0.3, extra), atol=1e-5)


@pytest.mark.parametrize(
    "platform, d, dtype, rows, chosen",
    [
        ("tpu", 128, jnp.bfloat16, 1024, "splash"),
        ("tpu", 128, jnp.bfloat16, 64, "xla"),  # too short to be worth it
        ("tpu", 64, jnp.bfloat16, 1024, "xla"),
        ("gpu", 128, jnp.bfloat16, 1024, "cudnn"),
        ("gpu", 128, jnp.float32, 1024, "xla"),
        ("cpu", 128, jnp.bfloat16, 1024, "per_head"),
    ],
)
def test_auto_takes_what_fits(monkeypatch, platform, d, dtype, rows, chosen):
    monkeypatch.setattr(kernels, "platform", lambda: platform)
    q = k = v = jax.ShapeDtypeStruct((1, rows, 2, d), dtype)
    assert kernels.choose("auto", q, k, v, None) == chosen
    bias = jax.ShapeDtypeStruct((1, 2, rows, rows), jnp.float32)
    assert kernels.choose("auto", q, k, v, bias) in ("xla", "per_head")


@pytest.mark.parametrize(
    "platform, kernel, d, message",
    [
        ("cpu", "splash", 128, "attention 'splash': needs a TPU, this program is for CPU; use 'auto'"),
        ("tpu", "splash", 64, "attention 'splash': head size 64; takes 128 or 256; use 'auto'"),
        (
            "gpu",
            "cudnn",
            128,
            "attention 'cudnn': head size 128 in float32; takes multiples of 8 up to 128 in bfloat16",
        ),
        ("cpu", "flash", 128, "attention 'flash': expected one of auto, xla, per_head, splash, cudnn"),
    ],
)
def test_a_kernel_that_does_not_fit(monkeypatch, platform, kernel, d, message):
    monkeypatch.setattr(kernels, "platform", lambda: platform)
    with pytest.raises(UserError, match=message):
        attention(*arrays(8, 8, d), kernel=kernel)


def test_the_command_says_so(dynaip, tmp_path):
    command = ("sample", "--prompt", "a star on grass at noon", "--steps", 1, "--output", tmp_path / "o.png")
    status, _, stderr = dynaip(*command, "--attention", "cudnn")
    assert status == 2 and "error: attention 'cudnn': needs a GPU, this program is for CPU; use 'auto'" in stderr
    assert not (tmp_path / "o.png").exists()
