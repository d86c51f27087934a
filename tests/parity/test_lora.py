"""The transformer with LoRAs merged in, against diffusers with them loaded by its own reader, for the kinds that this reads right.

Tolerance: max |ours - theirs| <= 1e-4 of max |theirs|. diffusers drops DoRA's scales, LoHa, differences and biases, so that these are
held against formulas in tests/adapters/test_lora.py alone; DoRA as PEFT itself computes it is here.
"""

import copy
import json

import jax
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from dynaip_jax.adapters.lora import Scaled, merge
from dynaip_jax.adapters.lora_file import read_changes
from dynaip_jax.families.flux_names import public_names
from dynaip_jax.models.clip import CLIPTextConfig
from dynaip_jax.models.flux import Flux
from dynaip_jax.models.t5 import T5Config
from tests.parity.test_flux import assert_close, inputs, run_torch, torch_model
from tools.convert_torch_weights import flux as convert_flux

ATTENTION = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "proj_out",
    "norm.linear",
    "proj_mlp",
]
META = {"transformer.r": 3, "transformer.lora_alpha": 2, "transformer.use_rslora": True}
XLABS = {"qkv_lora1": (144, 48), "qkv_lora2": (144, 48), "proj_lora1": (48, 48), "proj_lora2": (48, 48)}


@pytest.fixture(scope="module")
def model():
    return torch_model()


@pytest.fixture(scope="module")
def ours(model):
    """The output with a file's tensors merged in."""
    config = convert_flux.config_from_diffusers(dict(model.config))
    params = convert_flux.params_from_torch(model.state_dict(), config)
    names = public_names(config, CLIPTextConfig.tiny(), T5Config.tiny())
    apply = jax.jit(Flux(config).apply)

    def run(tensors, metadata, scale=1.0):
        arrays = {name: x.detach().numpy() for name, x in tensors.items()}
        asked = read_changes("x", Shapes(arrays), metadata, names, lambda name: arrays[name].astype(np.float32))
        merged = merge(params, names.components["transformer"], [Scaled(c, scale) for c in asked.changes])
        return apply({"params": merged}, **inputs(config))

    return run


class Shapes(dict):
    def shape(self, name):
        return self[name].shape


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def peft_file(model, end=".lora_A.weight", other=".lora_B.weight"):
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "blocks" in n]
    tensors = {}
    for seed, name in enumerate(names):
        out, in_ = model.get_submodule(name).weight.shape
        tensors[f"transformer.{name}{end}"] = random(3, in_, seed=seed)
        tensors[f"transformer.{name}{other}"] = random(out, 3, seed=seed + 1000)
    return tensors


def xlabs_file(model):
    tensors = {}
    for n in range(model.config.num_layers):
        for seed, (part, (out, in_)) in enumerate(XLABS.items()):
            key = f"double_blocks.{n}.processor.{part}"
            tensors |= {
                f"{key}.down.weight": random(4, in_, seed=seed),
                f"{key}.up.weight": random(out, 4, seed=seed + 50),
            }
    return tensors


def kohya_file(model):
    """Without linear1, for which diffusers knows FLUX.1's own sizes alone."""
    tensors = {}
    for seed, (name, out, in_) in enumerate(
        (
            ("double_blocks_0_img_attn_qkv", 144, 48),
            ("double_blocks_1_txt_mlp_0", 192, 48),
            ("single_blocks_2_linear2", 48, 240),
        )
    ):
        key = f"lora_unet_{name}"
        tensors |= {
            f"{key}.lora_down.weight": random(4, in_, seed=seed),
            f"{key}.lora_up.weight": random(out, 4, seed=seed + 9),
        }
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    return tensors


@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["diffusers", "header", "xlabs", "kohya"])
def test_output_is_that_of_diffusers_with_the_lora_loaded(model, ours, tmp_path, kind, scale):
    tensors = dict(diffusers=peft_file, header=peft_file, xlabs=xlabs_file, kohya=kohya_file)[kind](model)
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "blocks" in n]
    header = META | {"transformer.target_modules": linears}
    metadata = {"lora_adapter_metadata": json.dumps(header)} if kind == "header" else {}
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    loaded = copy.deepcopy(model)
    state, alphas, meta = FluxPipeline.lora_state_dict(
        tmp_path, weight_name="lora.safetensors", return_alphas=True, return_lora_metadata=True
    )
    FluxPipeline.load_lora_into_transformer(state, alphas, loaded, adapter_name="a", metadata=meta)
    loaded.set_adapters(["a"], [scale])
    x = inputs(convert_flux.config_from_diffusers(dict(model.config)))
    theirs, plain = run_torch(loaded, x), run_torch(model, x)
    assert np.abs(theirs - plain).max() > 0.01 * np.abs(plain).max()
    assert_close(ours(tensors, metadata, scale), theirs)


@pytest.mark.parametrize("dora", [False, True])
def test_a_live_adapter_of_peft(model, ours, dora):
    """As diffusers' trainers save it: DoRA's magnitudes, biases of the up matrices, alpha in the header."""
    live = copy.deepcopy(model)
    options = dict(use_dora=True) if dora else dict(lora_bias=True)
    live.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=ATTENTION, **options))
    with torch.no_grad():
        for seed, (name, p) in enumerate(live.named_parameters()):
            if "magnitude" in name:
                p.mul_(1 + 0.3 * random(*p.shape, seed=seed))
            elif "lora_" in name:
                p.copy_(random(*p.shape, seed=seed))
    tensors = {f"transformer.{name}": x for name, x in get_peft_model_state_dict(live).items()}
    header = {"transformer.r": 3, "transformer.lora_alpha": 6}
    x = inputs(convert_flux.config_from_diffusers(dict(model.config)))
    assert_close(ours(tensors, {"lora_adapter_metadata": json.dumps(header)}), run_torch(live, x))
