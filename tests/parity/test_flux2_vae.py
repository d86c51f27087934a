"""FLUX.2's autoencoder against diffusers' and its pipeline's latents, random weights, float32 on CPU.

Tolerance: max |ours - theirs| <= 1e-4 of max |theirs|; what is seen is about 2e-6, the rounding of float32.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from dynaip_jax.errors import UserError
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.flux2_vae import Flux2VAE, Flux2VAEConfig
from tools.convert_torch_weights import engine
from tools.convert_torch_weights import flux2_vae as convert_vae

SIZES = dict(block_out_channels=(32, 32, 64), latent_channels=5, layers_per_block=1, sample_size=32)
LEVELS = dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
PICTURES = np.random.default_rng(0).uniform(-1, 1, (2, 24, 40, 3)).astype(np.float32)


def assert_close(ours, theirs, tolerance=1e-4):
    theirs = np.asarray(theirs)
    assert np.asarray(ours).shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


def torch_vae(**changes):
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(**SIZES, **LEVELS, **changes).eval()
    with torch.no_grad():
        for p in vae.parameters():  # norms and biases too, so that no term hides behind a one or a zero
            p.add_(0.1 * torch.randn_like(p))
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.0, 2.0)
        vae.bn.running_var[3] = 1e-4  # as small as what is added to it
    return vae


@pytest.fixture(
    scope="module", params=[{}, dict(decoder_block_out_channels=(64, 64, 128))], ids=["whole", "other decoder"]
)
def oracle(request):
    """diffusers' autoencoder, our config and parameters of it."""
    vae = torch_vae(**request.param)
    config = convert_vae.config_from_diffusers(json.loads(vae.to_json_string()))
    return vae, config, convert_vae.params_from_torch(tensors_of(vae), config)


def tensors_of(vae):
    return {n: x.numpy() for n, x in vae.state_dict().items()}


class Pipeline:
    """What `_encode_vae_image` of diffusers' pipeline needs."""

    _patchify_latents = staticmethod(Flux2KleinPipeline._patchify_latents)

    def __init__(self, vae):
        self.vae = vae


def test_latents_of_diffusers(oracle):
    vae, config, params = oracle
    with torch.no_grad():
        theirs = Flux2KleinPipeline._encode_vae_image(Pipeline(vae), torch.tensor(PICTURES).permute(0, 3, 1, 2), None)
        logvar = Flux2KleinPipeline._patchify_latents(
            vae.encode(torch.tensor(PICTURES).permute(0, 3, 1, 2)).latent_dist.logvar
        )
    moments = jax.jit(lambda x: Flux2VAE(config).apply({"params": params}, x, method="encode"))(PICTURES)
    assert_close(Flux2VAE(config).apply({}, moments, method="latents"), theirs)
    logvar = logvar.permute(0, 2, 3, 1).numpy() - np.log(np.asarray(params["statistics"]["variance"]) + 1e-4)
    assert_close(moments[..., config.latent_channels :], logvar)


def test_pictures_of_diffusers(oracle):
    vae, config, params = oracle
    latents = np.random.default_rng(1).normal(size=(2, 20, 3, 5)).astype(np.float32)
    z = torch.tensor(latents) * torch.sqrt(vae.bn.running_var + 1e-4).view(1, -1, 1, 1) + vae.bn.running_mean.view(
        1, -1, 1, 1
    )
    with torch.no_grad():
        theirs = vae.decode(Flux2KleinPipeline._unpatchify_latents(z)).sample.permute(0, 2, 3, 1).numpy()
    ours = jax.jit(lambda x: Flux2VAE(config).apply({"params": params}, x, method="decode"))(latents)
    assert_close(ours, theirs)


def test_single_file_of_bfl_is_what_diffusers_makes_of_it():
    config = Flux2VAEConfig(ch=32, decoder_ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=5)
    shapes = engine.source_shapes(convert_vae.table(config, "bfl"))
    assert convert_vae.config_from_bfl(shapes) == config
    rng = np.random.default_rng(0)
    bfl = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    theirs = convert_ldm_vae_checkpoint({n: torch.tensor(x) for n, x in bfl.items()}, dict(SIZES, **LEVELS))
    again = {n: x.numpy() for n, x in theirs.items() if n.split(".")[0] != "bn"}
    names = {"encoder.quant_conv": "quant_conv", "decoder.post_quant_conv": "post_quant_conv"}
    for old, new in names.items():
        for kind in ("weight", "bias"):
            again[f"{new}.{kind}"] = bfl[f"{old}.{kind}"]
            again.pop(f"{old}.{kind}", None)
    again |= {n: bfl[n] for n in ("bn.running_mean", "bn.running_var")}
    ours = convert_vae.params_from_torch(bfl | {"bn.num_batches_tracked": np.array(7)}, config)
    jax.tree.map(np.testing.assert_array_equal, ours, convert_vae.params_from_torch(again, config))


def test_full_size_names_and_shapes():
    config = Flux2VAEConfig.flux2()
    with torch.device("meta"):
        vae = AutoencoderKLFlux2()
    assert convert_vae.config_from_diffusers(json.loads(vae.to_json_string())) == Flux2VAEConfig.flux2(resolution=1024)
    expected = {n: tuple(x.shape) for n, x in vae.state_dict().items() if n != "bn.num_batches_tracked"}
    target = convert_vae.target(config)
    assert len(expected) == 250
    for layout in ("bfl", "diffusers"):
        table = convert_vae.table(config, layout)
        source = engine.source_shapes(table)
        assert set(table) == set(target) and (layout == "bfl" or source == expected)
        assert sum(np.prod(s) for s in source.values()) == sum(np.prod(s.shape) for s in target.values())


def test_every_parameter_has_logical_axes():
    spec = Flux2VAE.inputs_spec(Flux2VAEConfig.tiny())
    tree = jax.eval_shape(lambda key, x: Flux2VAE(Flux2VAEConfig.tiny()).init(key, **x), jax.random.key(0), spec)
    boxes = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "names"))
    assert all(len(box.names) == box.value.ndim for box in boxes)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(use_quant_conv=False), "use_quant_conv False, expected True"),
        (dict(patch_size=[1, 1]), r"patch_size \[1, 1\], expected \[2, 2\]"),
        (dict(_class_name="AutoencoderKL"), "_class_name 'AutoencoderKL', expected 'AutoencoderKLFlux2'"),
        (dict(decoder_block_out_channels=[32, 64, 64]), "expected the multiples of block_out_channels"),
        (dict(block_out_channels=[48, 48, 48]), "ch 48: expected a multiple of 32"),
    ],
)
def test_unsupported_diffusers_settings(change, message):
    config = json.loads(torch_vae().to_json_string())
    with pytest.raises(UserError, match=message):
        convert_vae.config_from_diffusers(config | change)


def test_what_does_not_fit():
    with pytest.raises(UserError, match="no bn.running_mean"):
        convert_vae.params_from_torch({"encoder.down.0.block.0.conv1.weight": np.zeros(2)}, Flux2VAEConfig.tiny())
    with pytest.raises(ValueError, match="^decoding: ch 48"):
        Flux2VAEConfig.tiny(decoder_ch=48)
    with pytest.raises(ValueError, match="^resolution 40: expected a multiple of 16"):
        Flux2VAEConfig.tiny(resolution=40)
    with pytest.raises(ValueError, match="^remat "):
        jax.eval_shape(
            Flux2VAE(Flux2VAEConfig.tiny(), Compute(remat="dots")).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
        )
    with pytest.raises(ValueError, match="32 x 40 pixels: expected multiples of 16"):
        jax.eval_shape(Flux2VAE(Flux2VAEConfig.tiny()).init, jax.random.key(0), jnp.zeros((1, 32, 40, 3)))
