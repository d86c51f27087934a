"""XLabs' image-prompt adapters, v1 and v2, against diffusers' `load_ip_adapter`, random weights, float32 on CPU.

Tolerance: max |ours - theirs| <= 1e-4 of max |theirs|.
"""

import copy
import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file

from dynaip_jax.adapters.ip_adapter import BLOCK, PROJECTION, IPAdapter, IPAdapterConfig, abstract_ip_adapter_params
from dynaip_jax.models.flux import Flux
from dynaip_jax.runtime.sharding import on_one_device
from dynaip_jax.sampling.public_adapters import PublicFile
from dynaip_jax.storage.tensors import TensorFile
from dynaip_jax.types import Sites
from tests.parity.test_flux import assert_close, inputs, torch_model
from tools.convert_torch_weights import flux as convert_flux

EMBEDDING, DEPTH, WIDTH = 12, 2, 48
SITES = Sites(DEPTH, 3, 3, 16, WIDTH)


def random(*shape, seed, scale=0.2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def adapter_file(folder, tokens, width):
    """A file as XLabs publishes it; diffusers takes 16 tokens for 65536 rows, 4 for any other number."""
    tensors = {
        f"{PROJECTION}.proj.weight": random(tokens * width, EMBEDDING, seed=1),
        f"{PROJECTION}.proj.bias": random(tokens * width, seed=2),
        f"{PROJECTION}.norm.weight": 1 + random(width, seed=3),
        f"{PROJECTION}.norm.bias": random(width, seed=4),
    }
    for n in range(DEPTH):
        for j, kind in enumerate("kv"):
            tensors[f"{BLOCK.format(n, kind)}.weight"] = random(WIDTH, width, seed=5 + 4 * n + j, scale=width**-0.5)
            tensors[f"{BLOCK.format(n, kind)}.bias"] = random(WIDTH, seed=7 + 4 * n + j)
    save_file(tensors, folder / "ip_adapter.safetensors")
    return folder / "ip_adapter.safetensors"


class Both:
    """Both programs with a file: the velocity of `embeds` `[b, s, EMBEDDING]` at a scale, or one a block."""

    def __init__(self, folder, tokens, width):
        self.model = torch_model(joint_attention_dim=width)
        self.flux = convert_flux.config_from_diffusers(dict(self.model.config))
        self.params = convert_flux.params_from_torch(self.model.state_dict(), self.flux)
        self.x, path = inputs(self.flux), adapter_file(folder, tokens, width)
        file = TensorFile(path)
        self.config = IPAdapterConfig.of_shapes({name: tuple(file.shape(name)) for name in file}, SITES)
        assert (self.config.tokens, self.config.width) == (tokens, width)
        target = on_one_device(nn.meta.unbox(abstract_ip_adapter_params(self.config)))
        self.adapter = PublicFile.open(path).read(self.config, target)
        loaded = copy.deepcopy(self.model)
        parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        self.pipe = FluxPipeline(**parts, transformer=loaded)
        self.pipe.load_ip_adapter(str(folder), weight_name=path.name, image_encoder_pretrained_model_name_or_path=None)

    def theirs(self, embeds, scale):
        self.pipe.set_ip_adapter_scale(scale)
        x, model = self.x, self.pipe.transformer

        def t(name):
            return torch.tensor(x[name])

        with torch.no_grad():
            return model(
                hidden_states=t("img"), encoder_hidden_states=t("txt"), pooled_projections=t("pooled"), timestep=t("timesteps"),
                guidance=t("guidance"), img_ids=t("img_ids")[0], txt_ids=t("txt_ids")[0],
                joint_attention_kwargs=dict(ip_adapter_image_embeds=[torch.tensor(embeds)]),
            ).sample.numpy()  # fmt: skip

    def ours(self, embeds, scale, merge="sum"):
        prompt = IPAdapter(self.config).apply({"params": self.adapter}, embeds)
        prompt = prompt.scaled(np.reshape(np.asarray(scale, np.float32), (-1, 1, 1)))
        how = dataclasses.replace(self.config.injection, merge=merge)
        return jax.jit(Flux(self.flux, injection=how).apply)({"params": self.params}, **self.x, image_prompt=prompt)


@pytest.fixture(scope="module", params=[(4, 20), (16, 4096)], ids=["v1", "v2"])
def both(request, tmp_path_factory):
    return Both(tmp_path_factory.mktemp("xlabs"), *request.param)


@pytest.mark.parametrize("tokens", [4, 16])
def test_full_size_names_and_shapes(tokens):
    """What torch's own modules are called, each used exactly once."""
    with torch.device("meta"):
        proj, norm, kv = torch.nn.Linear(768, tokens * 4096), torch.nn.LayerNorm(4096), torch.nn.Linear(4096, 3072)
    modules = {f"{PROJECTION}.proj": proj, f"{PROJECTION}.norm": norm}
    modules |= {BLOCK.format(n, kind): kv for n in range(19) for kind in "kv"}
    named = {f"{m}.{n}": tuple(x.shape) for m, layer in modules.items() for n, x in layer.state_dict().items()}
    config = IPAdapterConfig.of_shapes(named, Sites(19, 38, 24, 128, 3072))
    assert len(named) == 80 and config == IPAdapterConfig(tokens) and config.shapes() == named
    assert_used_once(config, named)


def assert_used_once(config, named):
    """Every tensor of `named` (name -> shape) is read once, for a leaf of the adapter's own shape; nothing is allocated."""
    read = []

    def reader(name, *shape):
        read.append(name)
        assert np.prod(shape) == np.prod(named[name])
        return np.broadcast_to(np.zeros((), np.float16), shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "stack", lambda rows: np.broadcast_to(rows[0], (len(rows), *rows[0].shape)))
        tree = config.tree(reader)
    assert sorted(read) == sorted(named)
    expected = nn.meta.unbox(abstract_ip_adapter_params(config))
    assert jax.tree.map(np.shape, tree) == jax.tree.map(lambda x: x.shape, expected)


def embeddings(pictures):
    return np.random.default_rng(0).normal(size=(2, pictures, EMBEDDING)).astype(np.float32)


@pytest.mark.parametrize("scale", [0.7, [0.2, 1.3]])
def test_velocity_of_diffusers(both, scale):
    """At one scale, and at one of each block."""
    embeds = embeddings(1)
    theirs = both.theirs(embeds, scale)
    assert np.abs(theirs - both.theirs(embeds, 0.0)).max() > 0.01 * np.abs(theirs).max()
    assert_close(both.ours(embeds, scale), theirs)


def test_several_pictures_share_a_softmax_in_diffusers(both):
    """`merge` concat; sum is this project's default."""
    embeds = embeddings(2)
    assert_close(both.ours(embeds, 0.7, "concat"), both.theirs(embeds, 0.7))
