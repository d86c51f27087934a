"""InstantX's image-prompt adapter against a reading of its wiring in torch, random weights, float32 on CPU.

The reading is written here, over diffusers' transformer, and shares nothing with the library: queries are those of the image stream
(double blocks) or of all rows (single blocks), normed, before RoPE; keys are normed without a scale (epsilon 1e-5), values are not; the
term is added before the output projection. Tolerance: max |ours - theirs| <= 1e-4 of max |theirs|.
"""

import copy

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from safetensors.torch import save_file

from dynaip_jax.adapters.instantx import InstantX, InstantXConfig
from dynaip_jax.adapters.ip_adapter import abstract_ip_adapter_params
from dynaip_jax.models.flux import Flux
from dynaip_jax.runtime.sharding import on_one_device
from dynaip_jax.sampling import public_adapters
from dynaip_jax.sampling.public_adapters import PublicFile
from dynaip_jax.types import Sites
from tests.parity.test_flux import assert_close, inputs, torch_model
from tests.parity.test_ip_adapter import assert_used_once, random
from tools.convert_torch_weights import flux as convert_flux

TOKENS, WIDTH, EMBEDDING, HIDDEN, DOUBLE, SINGLE, HEADS, HEAD = 6, 20, 10, 14, 2, 3, 3, 16
SITES = Sites(DOUBLE, SINGLE, HEADS, HEAD, HEADS * HEAD)


def weights():
    """As InstantX publishes them: a dictionary of two."""
    proj = {
        "proj.0.weight": random(HIDDEN, EMBEDDING, seed=1),
        "proj.0.bias": random(HIDDEN, seed=2),
        "proj.2.weight": random(TOKENS * WIDTH, HIDDEN, seed=3),
        "proj.2.bias": random(TOKENS * WIDTH, seed=4),
        "norm.weight": 1 + random(WIDTH, seed=5),
        "norm.bias": random(WIDTH, seed=6),
    }
    blocks = {
        f"{n}.to_{kind}_ip.weight": random(HEADS * HEAD, WIDTH, seed=10 + 2 * n + j, scale=WIDTH**-0.5)
        for n in range(DOUBLE + SINGLE)
        for j, kind in enumerate("kv")
    }
    return dict(image_proj=proj, ip_adapter=blocks)


class Processor:
    """A block's attention with the terms of `pictures` `[b, TOKENS, WIDTH]`, each times `scale`; `text` of it in the text rows of single
    blocks, of which there are `text_rows`."""

    def __init__(self, k, v, pictures, scale, text, text_rows):
        self.k, self.v, self.pictures, self.scale, self.text, self.rows = k, v, pictures, scale, text, text_rows

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        def split(x):
            return x.unflatten(-1, (HEADS, HEAD)).transpose(1, 2)

        query, key, value = (split(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        term = torch.zeros_like(hidden_states)
        for tokens in self.pictures:
            own = split(F.linear(tokens, self.k))
            own = own / (own.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            heads = F.scaled_dot_product_attention(query, own, split(F.linear(tokens, self.v)))
            term = term + heads.transpose(1, 2).flatten(2)
        gains = torch.full((hidden_states.shape[1], 1), self.scale)
        if encoder_hidden_states is None:
            gains[: self.rows] *= self.text
        else:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = [split(layer(encoder_hidden_states)) for layer in layers]
            text = [attn.norm_added_q(text[0]), attn.norm_added_k(text[1]), text[2]]
            query, key, value = (torch.cat(pair, 2) for pair in zip(text, (query, key, value), strict=True))
        query, key = (apply_rotary_emb(x, image_rotary_emb) for x in (query, key))
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out + gains * term
        out, image = out[:, : self.rows], out[:, self.rows :] + gains * term
        return attn.to_out[0](image), attn.to_add_out(out)


def theirs(model, x, embeds, scales, text):
    """The velocity of `embeds` `[b, s, EMBEDDING]` at a scale for each block."""
    model, w = copy.deepcopy(model), weights()
    p = w["image_proj"]

    def tokens(e):
        middle = F.gelu(F.linear(e, p["proj.0.weight"], p["proj.0.bias"]))
        rows = F.linear(middle, p["proj.2.weight"], p["proj.2.bias"]).unflatten(-1, (TOKENS, WIDTH))
        return F.layer_norm(rows, (WIDTH,), p["norm.weight"], p["norm.bias"])

    pictures = [tokens(e) for e in torch.tensor(embeds).unbind(1)]
    for n, block in enumerate([*model.transformer_blocks, *model.single_transformer_blocks]):
        k, v = (w["ip_adapter"][f"{n}.to_{kind}_ip.weight"] for kind in "kv")
        block.attn.processor = Processor(k, v, pictures, scales[n], text, x["txt"].shape[1])

    def t(name):
        return torch.tensor(x[name])

    with torch.no_grad():
        return model(
            hidden_states=t("img"), encoder_hidden_states=t("txt"), pooled_projections=t("pooled"), timestep=t("timesteps"),
            guidance=t("guidance"), img_ids=t("img_ids")[0], txt_ids=t("txt_ids")[0],
        ).sample.numpy()  # fmt: skip


def flat():
    return {f"{group}.{name}": x for group, part in weights().items() for name, x in part.items()}


@pytest.fixture(scope="module", params=["ip-adapter.bin", "ip-adapter.safetensors"])
def ours(request, tmp_path_factory):
    """The program with a file: the pickle that InstantX publishes, or the safetensors of others."""
    path = tmp_path_factory.mktemp("instantx") / request.param
    if path.suffix == ".bin":
        torch.save(weights(), path)
    else:
        save_file(flat(), path)
    file = PublicFile.open(path)
    shapes = {name: tuple(file.tensors.shape(name)) for name in file.tensors}
    config = InstantXConfig.of_shapes(shapes, SITES)
    assert config == InstantXConfig(TOKENS, WIDTH, EMBEDDING, HIDDEN, DOUBLE, SINGLE, HEADS, HEAD)
    assert config.shapes() == shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(public_adapters, "ROWS", 7)
        adapter = file.read(config, on_one_device(nn.meta.unbox(abstract_ip_adapter_params(config))))
    model = torch_model(joint_attention_dim=WIDTH)
    flux = convert_flux.config_from_diffusers(dict(model.config))
    params, x = convert_flux.params_from_torch(model.state_dict(), flux), inputs(flux)

    def velocity(embeds, scales, text):
        prompt = InstantX(config).apply({"params": adapter}, embeds, text_gain=text)
        prompt = prompt.scaled(np.asarray(scales, np.float32)[:, None, None])
        run = jax.jit(Flux(flux, injection=config.injection).apply)
        return run({"params": params}, **x, image_prompt=prompt)

    return velocity, lambda *how: theirs(model, x, *how)


@pytest.mark.parametrize("scales", [[0.7] * 5, [0.2, 1.3, 0.0, 0.9, 0.5]])
@pytest.mark.parametrize("text", [1.0, 0.0])
def test_velocity_of_its_wiring(ours, scales, text):
    """At one scale, and at one of each block; with the text rows of single blocks as InstantX has them, and without (DDS)."""
    embeds = np.random.default_rng(0).normal(size=(2, 1, EMBEDDING)).astype(np.float32)
    velocity, reading = ours
    expected = reading(embeds, scales, text)
    assert np.abs(expected - reading(embeds, scales, 1 - text)).max() > 0.002 * np.abs(expected).max()
    assert np.abs(expected - reading(embeds, [0.0] * 5, text)).max() > 0.01 * np.abs(expected).max()
    assert_close(velocity(embeds, scales, text), expected)


def test_terms_of_several_pictures_add_up(ours):
    embeds = np.random.default_rng(1).normal(size=(2, 2, EMBEDDING)).astype(np.float32)
    velocity, reading = ours
    assert_close(velocity(embeds, [0.7] * 5, 1.0), reading(embeds, [0.7] * 5, 1.0))


def test_full_size_names_and_shapes():
    """What torch's own modules are called, each used exactly once."""
    config = InstantXConfig()
    with torch.device("meta"):
        gelu = torch.nn.GELU()
        proj = torch.nn.Sequential(torch.nn.Linear(1152, 2304), gelu, torch.nn.Linear(2304, 128 * 4096))
        blocks = {f"{n}.to_{kind}_ip": torch.nn.Linear(4096, 3072, bias=False) for n in range(57) for kind in "kv"}
    parts = dict(image_proj=dict(proj=proj, norm=torch.nn.LayerNorm(4096, device="meta")), ip_adapter=blocks)
    named = {
        f"{group}.{module}.{name}": tuple(x.shape)
        for group, modules in parts.items()
        for module, layer in modules.items()
        for name, x in layer.state_dict().items()
    }
    assert config.shapes() == named and len(named) == 120
    assert InstantXConfig.of_shapes(named, Sites(19, 38, 24, 128, 3072)) == config
    assert_used_once(config, named)
