"""SigLIP's vision tower against transformers' torch one, random weights, float32 on CPU.

Tolerance: max |ours - theirs| <= 1e-5 of max |theirs|; what is seen is about 1e-6, the rounding of float32.
"""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from dynaip_jax.errors import UserError
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.siglip import SiglipVision, SiglipVisionConfig
from tests.parity.test_clip import assert_close, randomised, tensors_of
from tools.convert_torch_weights import engine, siglip
from tools.convert_torch_weights.sources import clip_vision

SIZES = dict(
    hidden_size=144, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=29, patch_size=14
)
PIXELS = np.random.default_rng(0).normal(size=(2, 29, 29, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return randomised(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES)))


@pytest.fixture(scope="module")
def pooled(model):
    with torch.no_grad():
        return model(torch.tensor(PIXELS.transpose(0, 3, 1, 2))).pooler_output.numpy()


def run(config, params, **compute):
    return jax.jit(SiglipVision(config, Compute(**compute)).apply)({"params": params}, PIXELS)


@pytest.mark.parametrize("kernel", ["xla", "per_head"])
def test_pooled_state_of_torch(model, pooled, kernel):
    config = SiglipVisionConfig.from_hf(model.config.to_dict())
    assert_close(run(config, siglip.params_from_torch(tensors_of(model), config), attention=kernel), pooled)


def prefixed(model):
    return {f"vision_model.{n.removeprefix('vision_model.')}": x for n, x in model.state_dict().items()}


def test_every_way_to_save_it_gives_the_same(model, pooled, tmp_path):
    """A folder of the tower, one of both towers, and the tower's file without a config."""
    model.save_pretrained(tmp_path / "tower")
    whole = {
        "text_model.final_layer_norm.bias": torch.ones(3),
        "logit_scale": torch.ones(1),
        "logit_bias": torch.ones(1),
    }
    (tmp_path / "both").mkdir()
    save_file(prefixed(model) | whole, tmp_path / "both" / "model.safetensors")
    hf = dict(model_type="siglip", vision_config=model.config.to_dict())
    (tmp_path / "both" / "config.json").write_text(json.dumps(hf))
    save_file(prefixed(model), tmp_path / "sigclip_vision_patch14_384.safetensors")
    for name in ("tower", "both", "sigclip_vision_patch14_384.safetensors"):
        ((component, source),) = clip_vision(tmp_path / name).items()
        params = source.convert(source.tensors, source.config)
        assert component == "siglip" and source.config.num_attention_heads == 2
        if name.endswith(".safetensors"):  # 29 pixels hold as many whole patches as 28
            assert source.config == SiglipVisionConfig(**SIZES | dict(image_size=28))
        assert_close(run(SiglipVisionConfig(**SIZES), params), pooled)


def test_full_size_names_and_shapes():
    config = SiglipVisionConfig.so400m()
    sizes = {name: getattr(config, name) for name in SIZES}
    hf = transformers.SiglipVisionConfig(**sizes)
    assert SiglipVisionConfig.from_hf(hf.to_dict()) == config and config.tokens == 729
    with torch.device("meta"):
        theirs = {n: tuple(p.shape) for n, p in transformers.SiglipVisionModel(hf).named_parameters()}
    assert engine.source_shapes(siglip.table(config)) == theirs
    target = siglip.target(config)
    assert set(siglip.table(config)) == set(target)
    assert sum(np.prod(s) for s in theirs.values()) == sum(np.prod(s.shape) for s in target.values())
    assert siglip.config_from_shapes(theirs) == SiglipVisionConfig.so400m(image_size=27 * 14)


def test_every_parameter_has_logical_axes():
    config = SiglipVisionConfig.tiny()
    tree = jax.eval_shape(SiglipVision(config).init, jax.random.key(0), **SiglipVision.inputs_spec(config))["params"]
    boxes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(len(b.names) == len(b.value.shape) for b in boxes)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="siglip2_vision_model"), "model_type 'siglip2_vision_model'"),
        (dict(vision_use_head=False), "vision_use_head False"),
        (dict(hidden_act="relu"), "hidden_act 'relu'"),
    ],
)
def test_configs_of_other_models(model, change, message):
    with pytest.raises(UserError, match=message):
        SiglipVisionConfig.from_hf(model.config.to_dict() | change)


def test_towers_that_do_not_fit_so400m_are_refused_without_a_config(model):
    shapes = {name: tuple(x.shape) for name, x in prefixed(model).items()}
    width = dict.fromkeys(["vision_model.embeddings.patch_embedding.weight"], (100, 3, 14, 14))
    with pytest.raises(UserError, match="width 100, no multiple of 72.*pass the folder that holds its config.json"):
        siglip.config_from_shapes(shapes | width)
    del shapes["vision_model.head.mlp.fc1.weight"]
    with pytest.raises(UserError, match="tensor vision_model.head.mlp.fc1.weight is missing"):
        siglip.config_from_shapes(shapes)
