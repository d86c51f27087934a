"""What the networks make of converted weights on the inputs of the zoo's goldens.

The zoo is a generator of tiny FLUX.1 files in the layouts of the public, made with torch and diffusers: `make_zoo.py` in the folder that
DYNAIP_ZOO names, by default `../shared/zoo` beside the checkout.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

from dynaip_jax.adapters.instantx import InstantXConfig
from dynaip_jax.adapters.ip_adapter import abstract_ip_adapter_params
from dynaip_jax.families.registry import FAMILIES
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.flux import Flux
from dynaip_jax.models.siglip import SiglipVisionConfig
from dynaip_jax.runtime.sharding import on_one_device
from dynaip_jax.sampling.public_adapters import PublicFile
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.testing import tiny_family
from tools.convert_torch_weights.registry import LAYOUTS
from tools.convert_torch_weights.sources import clip_vision, read
from tools.convert_torch_weights.writing import plan

ROOT = Path(__file__).parent.parent.parent
MAKER = Path(os.environ.get("DYNAIP_ZOO", ROOT.parent / "shared" / "zoo")) / "make_zoo.py"
COMPONENTS = {**FAMILIES["flux"].components, **FAMILIES["flux"].other_encoders}
GROUPS = "base,text,damage,adapter"
_compiled = {}


def make(folder):
    """The zoo's members, by name."""
    words = [sys.executable, MAKER.name, "--out", str(folder), "--groups", GROUPS]
    done = subprocess.run(words, cwd=MAKER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {m["name"]: m for m in json.loads((folder / "manifest.json").read_text())}


def read_in(kind, path):
    """The components that the converter finds, in float32: name -> (config, parameters)."""
    sources = read(path, LAYOUTS)[1].components if kind == "source" else clip_vision(path)
    planned = plan(sources, "float32")
    return {
        name: (part.source.config, unflatten_dict({n: leaf.value() for n, leaf in part.leaves.items()}, sep="."))
        for name, part in planned.items()
    }


def distance(name, config, params, golden):
    """The largest difference of a component's outputs from the golden's, relative to the golden's largest value."""
    g = load_file(golden)
    outputs = {n: np.asarray(x) for n, x in _function(name, config)(params, g).items()}
    return max(float(np.abs(x - g[f"out.{n}"]).max() / np.abs(g[f"out.{n}"]).max()) for n, x in outputs.items())


def adapter_distance(path, transformer, params, golden):
    """The same of the velocity with an image-prompt adapter, in the wiring of its makers, for a picture's embedding."""
    file = PublicFile.open(path)
    siglip = dict(siglip=SiglipVisionConfig.tiny(hidden_size=144)) if file.kind is InstantXConfig else {}
    family = tiny_family(transformer=transformer, **siglip)
    clip = dict(width=family.config("clip_vision").hidden_size, projection_dim=96)
    config = file.config(Bundle(path, dict(components=dict(clip_projection=dict(config=clip)))), family)
    adapter = file.read(config, on_one_device(nn.meta.unbox(abstract_ip_adapter_params(config))))
    g = load_file(golden)
    scale = float(g["in.scale"])
    gains = dict(image_gain=scale, text_gain=scale if siglip else 0.0)
    prompt = config.module(Compute()).apply({"params": adapter}, g["in.image_embed"][None], **gains)
    module = Flux(transformer, injection=config.injection)
    out = jax.jit(_transformer(module, transformer))(params, g | dict(image_prompt=prompt))["velocity"]
    return float(np.abs(out - g["out.velocity"]).max() / np.abs(g["out.velocity"]).max())


def _function(name, config):
    if (name, config) not in _compiled:
        _compiled[name, config] = jax.jit(FUNCTIONS[name](COMPONENTS[name].module(config), config))
    return _compiled[name, config]


def _transformer(module, config):
    def run(params, g):
        rows = (
            g["in.img"],
            g["in.img_ids"][None],
            g["in.txt"],
            g["in.txt_ids"][None],
            g["in.timestep"],
            g["in.pooled"],
        )
        guidance = g["in.guidance"] if config.guidance_embed else None
        prompt = g.get("image_prompt")
        return dict(velocity=module.apply({"params": params}, *rows, guidance=guidance, image_prompt=prompt))

    return run


def _vae(module, config):
    def run(params, g):
        last = lambda x: jnp.moveaxis(x, 1, -1)
        moments = module.apply({"params": params}, last(g["in.image"]), method="encode")
        scaled = (g["in.z"] - config.shift_factor) * config.scale_factor
        decoded = module.apply({"params": params}, scaled, method="decode")
        first = lambda x: jnp.moveaxis(x, -1, 1)
        return dict(mean=first(moments)[:, : config.z_channels], decoded=first(decoded))

    return run


def _vision(module, config):
    def run(params, g):
        layers = tuple(range(config.num_hidden_layers + 1))
        states, _ = module.apply({"params": params}, jnp.moveaxis(g["in.pixels"], 1, -1), layers=layers)
        return {f"hidden_{i}": x for i, x in enumerate(states)}

    return run


FUNCTIONS = dict(
    transformer=_transformer,
    vae=_vae,
    clip_vision=_vision,
    t5=lambda module, config: lambda params, g: dict(hidden=module.apply({"params": params}, g["in.ids"])),
    siglip=lambda module, config: (
        lambda params, g: dict(pooled=module.apply({"params": params}, jnp.moveaxis(g["in.pixels"], 1, -1)))
    ),
    clip_text=lambda module, config: lambda params, g: dict(pooled=module.apply({"params": params}, g["in.ids"])[1]),
)
