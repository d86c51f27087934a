"""The autoencoder against BFL's own outputs (fixture) and against diffusers, random weights, float32 on CPU.

Tolerance: max |ours - theirs| <= 1e-4 of max |theirs|; what is seen is up to 2e-5, the rounding of float32.
"""

import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from dynaip_jax.errors import UserError
from dynaip_jax.images.preprocess import to_uint8
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.vae import VAE, VAEConfig
from dynaip_jax.storage.tensors import TensorFile
from tests.conftest import FIXTURES
from tools.convert_torch_weights import engine
from tools.convert_torch_weights import vae as convert_vae

FLUX = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    sample_size=256,
    use_quant_conv=False,
    use_post_quant_conv=False,
    scaling_factor=0.3611,
    shift_factor=0.1159,
)


def assert_close(ours, theirs, tolerance=1e-4):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


def last(x):
    return np.moveaxis(np.asarray(x), 1, -1)


@pytest.fixture(scope="module")
def oracle():
    """A small diffusers model with random weights, norms too, its config in ours, and its parameters converted."""
    torch.manual_seed(0)
    model = AutoencoderKL(**{**FLUX, "block_out_channels": (32, 64, 64, 64), "layers_per_block": 1}).eval()
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 0.5, 0.3)
    config = convert_vae.config_from_diffusers(json.loads(model.to_json_string()))
    return model, config, convert_vae.params_from_torch(model.state_dict(), config)


@pytest.fixture(scope="module")
def batch():
    """Pictures `[2, 40, 64, 3]` and latents `[2, 16, 5, 8]`: not square, an odd number of latent rows."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 40, 64, 3)).astype(np.float32)
    return images, rng.normal(size=(2, 16, 5, 8)).astype(np.float32)


def run_torch(model, images, latents, dtype=torch.float32):
    """diffusers' moments `[b, 2z, h, w]` and, from scaled latents, pictures `[b, 3, H, W]`."""
    c = model.config
    with torch.no_grad():
        moments = model.encode(torch.tensor(np.moveaxis(images, -1, 1)).to(dtype)).latent_dist.parameters
        decoded = model.decode((torch.tensor(latents) / c.scaling_factor + c.shift_factor).to(dtype)).sample
    return moments.float().numpy(), decoded.float().numpy()


def run_ours(config, params, images, latents, **compute):
    vae = VAE(config, Compute(**compute))
    run = jax.jit(vae.apply, static_argnames="method")
    return run({"params": params}, images, method="encode"), run({"params": params}, latents, method="decode")


def test_each_stage_of_bfl_fixture():
    file = TensorFile(FIXTURES / "vae_tiny_bfl.safetensors.index.json")
    config = VAEConfig(**json.loads(file.metadata["config"]))
    weights = {n.removeprefix("weights."): file[n] for n in file if n.startswith("weights.")}
    vae, params = VAE(config), {"params": convert_vae.params_from_torch(weights, config)}
    moments = vae.apply(params, last(file["in.image"]), method="encode")
    assert_close(moments, last(file["out.moments"]))
    latents = vae.apply(params, last(file["out.moments"]), method="latents")
    assert_close(latents, file["out.latents_of_mean"])
    assert_close(vae.apply(params, file["out.latents_of_mean"], method="decode"), last(file["out.decoded"]))
    assert_close(vae.apply(params, last(file["in.image"])), last(file["out.decoded"]))


def test_encode_and_decode_of_diffusers(oracle, batch):
    model, config, params = oracle
    moments, decoded = run_torch(model, *batch)
    ours = run_ours(config, params, *batch)
    assert_close(ours[0], last(moments))
    assert_close(ours[1], last(decoded))


def test_sampled_latents_of_diffusers():
    rng = np.random.default_rng(1)
    moments = rng.normal(0, 30, (2, 32, 5, 8)).astype(np.float32)  # log-variances far beyond both ends of the clip
    moments[0, 16:] /= 30
    noise = rng.normal(size=(2, 16, 5, 8)).astype(np.float32)
    theirs = DiagonalGaussianDistribution(torch.tensor(moments))
    sample = (theirs.mean + theirs.std * torch.tensor(noise) - 0.1159) * 0.3611
    ours = VAE(VAEConfig.flux()).apply({}, last(moments), noise, method="latents")
    for row in range(2):  # the second row's scale is e^10 times the first's
        assert_close(ours[row], sample[row])


def test_eight_bits_of_diffusers():
    decoded = np.random.default_rng(3).normal(0, 0.7, (2, 40, 64, 3)).astype(np.float32)
    theirs = VaeImageProcessor().postprocess(torch.tensor(np.moveaxis(decoded, -1, 1)), output_type="pil")
    np.testing.assert_array_equal(to_uint8(decoded), np.stack([np.asarray(picture) for picture in theirs]))


def test_bfloat16_is_as_near_to_float32_as_torchs_is(oracle, batch):
    model, config, params = oracle
    exact = run_torch(model, *batch)
    half = AutoencoderKL.from_config(model.config).eval()
    half.load_state_dict(model.state_dict())
    theirs = run_torch(half.bfloat16(), *batch, torch.bfloat16)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
    ours = run_ours(config, params, *batch, dtype=jnp.bfloat16)
    for x, y, z in zip(ours, theirs, exact, strict=True):
        assert x.dtype == jnp.float32
        error, allowed = (np.sqrt(np.mean((out - last(z)) ** 2)) for out in (np.asarray(x), last(y)))
        assert 0 < error <= 2 * allowed


def test_bfloat16_convolutions_run_in_bfloat16(oracle, batch):
    _, config, params = oracle
    half = VAE(config, Compute(dtype=jnp.bfloat16))
    program = str(jax.make_jaxpr(lambda images: half.apply({"params": params}, images))(batch[0]))
    convolutions = re.findall(r":(\w+)\[[\d,]*\] = conv_general_dilated", program)
    assert len(convolutions) > 20 and set(convolutions) == {"bf16"}


def test_full_size_names_and_shapes():
    bfl = json.loads((FIXTURES / "full_size_keys_bfl.json").read_text())["flux1_vae_bfl"]
    with torch.device("meta"):
        model = AutoencoderKL(**FLUX)
    expected = {
        "bfl": {n: tuple(s) for n, s in bfl.items()},
        "diffusers": {n: tuple(p.shape) for n, p in model.state_dict().items()},
    }
    target = convert_vae.target(VAEConfig.flux())
    count = sum(np.prod(s.shape) for s in target.values())
    assert round(count / 1e6, 1) == 83.8
    for layout, shapes in expected.items():
        table = convert_vae.table(VAEConfig.flux(), layout)
        assert engine.source_shapes(table) == shapes
        assert set(table) == set(target)
        assert sum(np.prod(s) for s in shapes.values()) == count
    assert "encoder/down_0/block_0/conv1/kernel" in target
    assert convert_vae.config_from_diffusers(dict(model.config)) == VAEConfig.flux()


def test_full_size_shapes_of_both_ways():
    config, compute = VAEConfig.flux(), Compute(param_dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 1024, 768, 3), jnp.float32)
    variables = jax.eval_shape(VAE(config, compute).init, jax.random.key(0), images)
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}

    def stages(variables, images):
        moments = VAE(config).apply(variables, images, method="encode")
        latents = VAE(config).apply(variables, moments, method="latents")
        return moments, latents, VAE(config).apply(variables, latents, method="decode")

    shapes = [x.shape for x in jax.eval_shape(stages, variables, images)]
    assert shapes == [(2, 128, 96, 32), (2, 16, 128, 96), (2, 1024, 768, 3)]


def test_every_kind_of_mismatch_names_both_sides(oracle):
    model, config, params = oracle
    good = {n: p.numpy() for n, p in model.state_dict().items()}
    name = "encoder.mid_block.attentions.0.to_q.weight"
    with pytest.raises(UserError, match=rf"vae: .*1 missing: {name} \[64, 64\].*1 unexpected: surplus \[2\]"):
        convert_vae.params_from_torch({n: p for n, p in good.items() if n != name} | {"surplus": np.zeros(2)}, config)
    with pytest.raises(UserError, match=rf"wrong shape: {name}: found \[3, 3\], expected \[64, 64\]"):
        convert_vae.params_from_torch(good | {name: np.zeros((3, 3))}, config)
    spoiled = good[name].copy()
    spoiled[3, 5] = np.nan
    with pytest.raises(UserError, match=f"{name} holds NaN"):
        convert_vae.params_from_torch(good | {name: spoiled}, config)
    with pytest.raises(UserError, match="neither BFL's.*'unet.weight'"):
        convert_vae.params_from_torch({"unet.weight": np.zeros(2)}, config)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(use_quant_conv=True), "use_quant_conv True, expected False"),
        (dict(use_post_quant_conv=True), "use_post_quant_conv True, expected False"),
        (dict(norm_num_groups=16), "norm_num_groups 16, expected 32"),
        (dict(mid_block_add_attention=False), "mid_block_add_attention False, expected True"),
        (dict(act_fn="gelu"), "act_fn 'gelu', expected 'silu'"),
        (dict(latents_mean=[0.0]), "latents_mean"),
        (dict(_class_name="AutoencoderTiny"), "_class_name 'AutoencoderTiny', expected 'AutoencoderKL'"),
        (dict(down_block_types=["AttnDownEncoderBlock2D"] * 4), "down_block_types"),
        (dict(block_out_channels=[32, 48, 64, 64]), r"block_out_channels \[32, 48, 64, 64\]"),
        (dict(block_out_channels=[48, 48, 48, 48]), "ch 48: expected a multiple of 32"),
    ],
)
def test_unsupported_diffusers_settings(oracle, change, message):
    config = json.loads(oracle[0].to_json_string())
    with pytest.raises(UserError, match=message):
        convert_vae.config_from_diffusers(config | change)


@pytest.mark.parametrize("field", ["use_quant_conv", "latent_channels"])
def test_diffusers_settings_left_out(oracle, field):
    config = json.loads(oracle[0].to_json_string())
    del config[field]
    with pytest.raises(UserError, match=field):  # the first by its default, True; the second has to be there
        convert_vae.config_from_diffusers(config)


@pytest.mark.parametrize(
    "change",
    [dict(ch=48), dict(ch_mult=()), dict(resolution=36), dict(z_channels=0), dict(scale_factor=0)],
)
def test_config_that_does_not_fit(change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))} "):
        VAEConfig.tiny(**change)


def test_remat_of_products_alone_is_refused():
    with pytest.raises(ValueError, match="^remat "):
        jax.eval_shape(VAE(VAEConfig.tiny(), Compute(remat="dots")).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_picture_of_a_size_that_does_not_fit():
    with pytest.raises(ValueError, match="32 x 36 pixels: expected multiples of 8"):
        jax.eval_shape(VAE(VAEConfig.tiny()).init, jax.random.key(0), jnp.zeros((1, 32, 36, 3)))


def test_remat_recomputes_and_changes_no_value():
    images = np.random.default_rng(2).uniform(-1, 1, (1, 16, 24, 3)).astype(np.float32)
    config = VAEConfig.tiny(ch_mult=(1,))
    init = jax.jit(lambda key: VAE(config).init(key, images, method="encode"))
    variables = nn.meta.unbox(init(jax.random.key(0)))

    def gradient(remat):
        model = VAE(config, Compute(remat=remat))
        return jax.grad(lambda v: jnp.sum(model.apply(v, images, method="encode") ** 2))

    assert "remat" in str(jax.make_jaxpr(gradient("full"))(variables))
    plain, again = (jax.jit(gradient(remat))(variables) for remat in ("none", "full"))
    largest = max(
        np.abs(x).max() for x in jax.tree.leaves(plain)
    )  # the gradients of biases before a norm are rounding alone
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * largest), plain, again)


def test_every_parameter_has_logical_axes():
    spec = VAE.inputs_spec(VAEConfig.tiny())
    tree = jax.eval_shape(lambda key, x: VAE(VAEConfig.tiny()).init(key, **x), jax.random.key(0), spec)
    boxes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    assert all(isinstance(box, nn.LogicallyPartitioned) and len(box.names) == box.value.ndim for box in boxes)
    assert {box.names for box in boxes if box.value.ndim == 4} == {(None, None, "conv_in", "conv_out")}
