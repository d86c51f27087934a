"""CLIP's towers against transformers' torch (5.x) and Flax (4.x) ones, random weights, float32 on CPU.

Tolerance: max |ours - theirs| <= 1e-5 of max |theirs|, for each output and each hidden state (the tanh GELU in place of
the exact one is 5e-5 off); what is seen is about 5e-7, the rounding of float32.
"""

import json
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dynaip_jax.errors import UserError
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from dynaip_jax.storage.tensors import TensorFile
from tests.parity.flax_goldens import TEXT, VISION, make_goldens
from tools.convert_torch_weights import clip as convert_clip
from tools.convert_torch_weights import engine

EOS, LEGACY_EOS = TEXT["eos_token_id"], 2
ALL_LAYERS = tuple(range(VISION["num_hidden_layers"] + 1))
RNG = np.random.default_rng(0)
PIXELS = RNG.normal(size=(2, 20, 20, 3)).astype(np.float32)
IDS = RNG.integers(3, 50, (4, TEXT["max_position_embeddings"])).astype(np.int32)
IDS[0, 4:] = EOS  # padded with itself, as CLIP's tokenizer does
IDS[1, 7] = EOS
IDS[2, 5] = 55  # no end: the highest id is here


def assert_close(ours, theirs, tolerance=1e-5):
    theirs = np.asarray(theirs)
    assert np.shape(ours) == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


def randomised(model):
    torch.manual_seed(0)
    for p in model.parameters():  # norms and biases too, so that no term hides behind a one or a zero
        torch.nn.init.normal_(p, 0.3 if p.ndim == 1 else 0.0, 0.3)
    return model.eval()


def text_model(cls=transformers.CLIPTextModel, **changes):
    return randomised(cls(transformers.CLIPTextConfig(**{**TEXT, "projection_dim": 8, **changes})))


def vision_model(cls=transformers.CLIPVisionModel, **changes):
    return randomised(cls(transformers.CLIPVisionConfig(**{**VISION, "projection_dim": 8, **changes})))


def both_towers():
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    return randomised(transformers.CLIPModel(config))


def tensors_of(model):
    return {n: p.numpy() for n, p in model.state_dict().items()}


def run_text(model):
    with torch.no_grad():
        out = model(torch.tensor(IDS))
    return out.last_hidden_state.float().numpy(), out.pooler_output.float().numpy()


def run_vision(model, dtype=torch.float32):
    with torch.no_grad():
        out = model(torch.tensor(PIXELS.transpose(0, 3, 1, 2)).to(dtype), output_hidden_states=True)
    return [h.float().numpy() for h in out.hidden_states], out.pooler_output.float().numpy()


def text(config, tensors, ids=IDS, **compute):
    return jax.jit(CLIPText(config, Compute(**compute)).apply)(
        {"params": convert_clip.text_params_from_torch(tensors, config)}, ids
    )


def vision(config, tensors, layers=ALL_LAYERS, pixels=PIXELS, **compute):
    params = convert_clip.vision_params_from_torch(tensors, config)
    return run_vision_params(config, params, layers, pixels, **compute)


def run_vision_params(config, params, layers, pixels=PIXELS, **compute):
    return jax.jit(partial(CLIPVision(config, Compute(**compute)).apply, layers=layers))({"params": params}, pixels)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [EOS, LEGACY_EOS])
def test_text_states_of_torch(act, eos, tmp_path):
    model = text_model(hidden_act=act, eos_token_id=eos)
    model.save_pretrained(tmp_path)
    config = CLIPTextConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert (config.hidden_act, config.eos_token_id) == (act, eos)
    for ours, theirs in zip(text(config, TensorFile(tmp_path / "model.safetensors")), run_text(model), strict=True):
        assert_close(ours, theirs)


def test_the_two_ways_to_find_the_end_differ_where_they_should():
    tensors = tensors_of(text_model())
    last, pooled = text(CLIPTextConfig.from_hf(TEXT), tensors)
    _, legacy = text(CLIPTextConfig.from_hf(TEXT | dict(eos_token_id=LEGACY_EOS)), tensors)
    np.testing.assert_array_equal(pooled[:3], last[[0, 1, 2], [4, 7, 0]])
    np.testing.assert_array_equal(legacy[:3], last[[0, 1, 2], [4, 7, 5]])


def test_no_token_sees_a_later_one():
    config, tensors = CLIPTextConfig.from_hf(TEXT), tensors_of(text_model())
    changed = IDS.copy()
    changed[:, 6:] = 1
    before, after = text(config, tensors)[0], text(config, tensors, changed)[0]
    np.testing.assert_allclose(before[:, :6], after[:, :6], atol=1e-6)
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 0.1


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kernel", ["xla", "per_head"])
def test_every_vision_state_of_torch(act, kernel, tmp_path):
    model = vision_model(hidden_act=act)
    model.save_pretrained(tmp_path)
    config = CLIPVisionConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    states, pooled = vision(config, TensorFile(tmp_path / "model.safetensors"), attention=kernel)
    their_states, their_pooled = run_vision(model)
    assert_close(pooled, their_pooled)
    for ours, theirs in zip(states, their_states, strict=True):
        assert_close(ours, theirs)


def test_states_of_flax(tmp_path):
    make_goldens(tmp_path, "clip_text", "clip_vision")
    for kind, config in (("clip_text", CLIPTextConfig), ("clip_vision", CLIPVisionConfig)):
        golden = np.load(tmp_path / kind / "goldens.npz")
        config = config.from_hf(json.loads((tmp_path / kind / "config.json").read_text()))
        tensors = convert_clip.from_flax(tmp_path / kind / "flax_model.msgpack")
        if kind == "clip_text":
            last, pooled = text(config, tensors, golden["input_ids"])
            assert_close(last, golden["last"])
        else:
            assert config.hidden_act == "gelu"
            states, pooled = vision(config, tensors, pixels=golden["pixel_values"])
            for ours, theirs in zip(states, golden["states"], strict=True):
                assert_close(ours, theirs)
        assert_close(pooled, golden["pooled"])


def test_bfloat16_is_as_near_to_float32_as_torchs_is():
    def error(x, exact):
        return np.sqrt(np.mean((np.asarray(x, np.float32) - exact) ** 2))

    half = dict(dtype=jnp.bfloat16)
    model = text_model()
    ours, exact = text(CLIPTextConfig.from_hf(TEXT), tensors_of(model), **half), run_text(model)
    assert {x.dtype for x in ours} == {jnp.dtype(jnp.bfloat16)}
    for mine, true, theirs in zip(ours, exact, run_text(model.bfloat16()), strict=True):
        assert 0 < error(mine, true) <= 1.5 * error(theirs, true)

    model = vision_model()
    (ours, pooled), (exact, exact_pooled) = (
        vision(CLIPVisionConfig.from_hf(VISION), tensors_of(model), **half),
        run_vision(model),
    )
    theirs, their_pooled = run_vision(model.bfloat16(), torch.bfloat16)
    for mine, true, half in zip([*ours, pooled], [*exact, exact_pooled], [*theirs, their_pooled], strict=True):
        assert 0 < error(mine, true) <= 1.5 * error(half, true)


def test_layers_come_in_the_order_asked_for():
    config, tensors = CLIPVisionConfig.from_hf(VISION), tensors_of(vision_model())
    states, _ = vision(config, tensors)
    asked, pooled = vision(config, tensors, (3, 0, 2, 0))
    assert pooled is not None
    for ours, n in zip(asked, (3, 0, 2, 0), strict=True):
        np.testing.assert_array_equal(ours, states[n])


def test_blocks_above_the_highest_layer_are_not_computed():
    config = CLIPVisionConfig.from_hf(VISION)
    params = convert_clip.vision_params_from_torch(tensors_of(vision_model()), config)
    (whole, _), _ = run_vision_params(config, params, (2, 3))
    poisoned = jax.tree.map(lambda p: np.concatenate([p[:2], p[2:] * np.nan]), params["blocks"])
    (early,), pooled = run_vision_params(config, params | dict(blocks=poisoned), (2,))
    np.testing.assert_allclose(early, whole, rtol=1e-6, atol=1e-6)
    assert pooled is None

    def steps(layers):
        program = jax.make_jaxpr(partial(CLIPVision(config).apply, layers=layers))({"params": params}, PIXELS)
        return [eqn.params["length"] for eqn in program.jaxpr.eqns if eqn.primitive.name == "scan"]

    assert (steps((1,)), steps((0, 2)), steps((1, 3))) == ([1], [2], [3])


def test_parameters_are_those_of_all_blocks_whatever_is_asked_for():
    config = CLIPVisionConfig.tiny()
    init = CLIPVision(config).init
    spec = CLIPVision.inputs_spec(config)
    one, all_ = (jax.eval_shape(partial(init, layers=n), jax.random.key(0), **spec) for n in ((1,), (2, 4)))
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, all_)
    assert one["params"]["blocks"]["fc1"]["kernel"].value.shape == (4, 32, 64)


def test_remat_changes_no_value():
    cases = (
        (text, CLIPTextConfig, TEXT, text_model(), "dots"),
        (vision, CLIPVisionConfig, VISION, vision_model(), "full"),
    )
    for run, config, hf, model, remat in cases:
        plain, again = (run(config.from_hf(hf), tensors_of(model), remat=r) for r in ("none", remat))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), plain, again)


def test_full_size_names_and_shapes():
    text_hf = transformers.CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_hidden_layers=12,
        max_position_embeddings=77,
    )
    vision_hf = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=24,
        image_size=224,
        patch_size=14,
    )
    text_config, vision_config = CLIPTextConfig.large(), CLIPVisionConfig.large()
    assert CLIPTextConfig.from_hf(text_hf.to_dict()) == text_config
    assert CLIPVisionConfig.from_hf(vision_hf.to_dict()) == vision_config
    with torch.device("meta"):
        models = transformers.CLIPTextModel(text_hf), transformers.CLIPVisionModel(vision_hf)
    tables = convert_clip.text_table(text_config), convert_clip.vision_table(vision_config)
    targets = convert_clip.text_target(text_config), convert_clip.vision_target(vision_config)
    for model, table, target in zip(models, tables, targets, strict=True):
        theirs = {n: tuple(p.shape) for n, p in model.named_parameters()}
        assert engine.source_shapes(table) == theirs
        assert set(table) == set(target)
        assert sum(np.prod(s) for s in theirs.values()) == sum(np.prod(s.shape) for s in target.values())


def test_every_parameter_has_logical_axes():
    for module, config in ((CLIPText, CLIPTextConfig.tiny()), (CLIPVision, CLIPVisionConfig.tiny())):
        kw = dict(layers=(0,)) if module is CLIPVision else {}
        init = partial(module(config).init, **kw)
        tree = jax.eval_shape(init, jax.random.key(0), **module.inputs_spec(config))["params"]
        boxes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
        assert all(len(b.names) == len(b.value.shape) for b in boxes)
        assert tree["blocks"]["q_proj"]["kernel"].names == ("layers", "embed", "heads", "head_dim")


def test_every_way_to_save_a_tower_gives_the_same_parameters(tmp_path):
    """Bare names (5.x), prefixed names (4.x), with projection, with the other tower, with the buffers of old files."""
    text_config, vision_config = CLIPTextConfig.from_hf(TEXT), CLIPVisionConfig.from_hf(VISION)
    both_towers().save_pretrained(tmp_path)
    both = TensorFile(tmp_path / "model.safetensors")
    hf = json.loads((tmp_path / "config.json").read_text())
    assert (CLIPTextConfig.from_hf(hf), CLIPVisionConfig.from_hf(hf)) == (text_config, vision_config)

    for own, convert, config, projected in (
        ("text_model.", convert_clip.text_params_from_torch, text_config, transformers.CLIPTextModelWithProjection),
        (
            "vision_model.",
            convert_clip.vision_params_from_torch,
            vision_config,
            transformers.CLIPVisionModelWithProjection,
        ),
    ):
        plain = convert(both, config)
        prefixed = {n: both[n] for n in both if n.startswith(own)}
        bare = {n.removeprefix(own): x for n, x in prefixed.items()}
        ids = np.arange(5)[None]
        for tensors in (
            prefixed,
            bare,
            prefixed | {f"{own}embeddings.position_ids": ids},
            bare | {"embeddings.position_ids": ids},
        ):
            jax.tree.map(np.testing.assert_array_equal, plain, convert(tensors, config))
        model = (text_model if own == "text_model." else vision_model)(projected)
        assert any("projection" in n for n in model.state_dict())
        again = convert(tensors_of(model), config)
        assert jax.tree.map(np.shape, again) == jax.tree.map(np.shape, plain)


def test_mismatches_are_named():
    tensors, config = tensors_of(vision_model()), CLIPVisionConfig.from_hf(VISION)
    name = "encoder.layers.1.self_attn.k_proj.weight"
    with pytest.raises(UserError, match=rf"clip_vision: .*1 missing: {name} \[24, 24\].*1 unexpected: surplus \[2\]"):
        rest = {n: x for n, x in tensors.items() if n != name}
        convert_clip.vision_params_from_torch(rest | {"surplus": np.zeros(2)}, config)
    with pytest.raises(UserError, match="missing: text_model.embeddings.token_embedding.weight"):
        prefixed = {f"vision_model.{n}": x for n, x in tensors.items()}
        convert_clip.text_params_from_torch(prefixed, CLIPTextConfig.from_hf(TEXT))
    with pytest.raises(UserError, match="unexpected: text_model.surplus"):
        prefixed = {f"text_model.{n}": x for n, x in tensors_of(text_model()).items()}
        convert_clip.text_params_from_torch(
            prefixed | {"text_model.surplus": np.zeros(2)}, CLIPTextConfig.from_hf(TEXT)
        )


class Lazy(dict):
    """Tensors that may be asked for their shape only."""

    def shape(self, name):
        return dict.__getitem__(self, name).shape

    def __getitem__(self, name):
        raise AssertionError(f"{name} was read")


def test_checking_reads_no_tensor():
    config = CLIPVisionConfig.from_hf(VISION)
    lazy = Lazy({f"vision_model.{n}": x for n, x in tensors_of(vision_model()).items()} | {"logit_scale": np.ones(())})
    assert convert_clip.vision_params_from_torch(lazy, config, check_only=True) == {}


def test_flax_files_that_are_none(tmp_path):
    from flax.serialization import msgpack_serialize

    good = msgpack_serialize({"a": {"kernel": np.arange(6.0).reshape(2, 3)}, "b": np.ones(2)})
    file = tmp_path / "flax_model.msgpack"
    file.write_bytes(good)
    tensors = convert_clip.from_flax(file)
    np.testing.assert_array_equal(tensors["a.weight"], np.arange(6.0).reshape(2, 3).T)
    for bad in (good[:-7], good + b"x", b"", b"PK\x03\x04 not msgpack", RNG.bytes(200)):
        file.write_bytes(bad)
        with pytest.raises(UserError, match="flax_model.msgpack: (not a whole Flax msgpack|holds no tree)"):
            convert_clip.from_flax(file)
    for tree in ({}, {"a": 3}, {"a": {"b": "text"}}):
        file.write_bytes(msgpack_serialize(tree))
        with pytest.raises(UserError, match="holds no tree of arrays"):
            convert_clip.from_flax(file)
    with pytest.raises(UserError, match="cannot be read .No such file"):
        convert_clip.from_flax(tmp_path / "absent.msgpack")


@pytest.mark.parametrize("layers", [(), (4,), (1, -1), (10, 17, 24)])
def test_layers_that_the_model_does_not_have(layers):
    config = CLIPVisionConfig.from_hf(VISION)
    with pytest.raises(ValueError, match=re.escape(f"layers {layers}: this vision encoder has 3 blocks")):
        CLIPVision(config).init(jax.random.key(0), PIXELS, layers=layers)


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(3, 20, 20\): expected \(20, 20, 3\), channels last"):
        CLIPVision(CLIPVisionConfig.from_hf(VISION)).init(jax.random.key(0), PIXELS.transpose(0, 3, 1, 2), layers=(1,))
    with pytest.raises(ValueError, match="12 tokens: this text encoder takes at most 11"):
        CLIPText(CLIPTextConfig.from_hf(TEXT)).init(jax.random.key(0), np.zeros((1, 12), np.int32))


@pytest.mark.parametrize(
    "config,change,message",
    [
        (
            CLIPTextConfig,
            dict(model_type="siglip_text_model"),
            "model_type 'siglip_text_model': expected 'clip_text_model'",
        ),
        (CLIPTextConfig, dict(model_type="clip_vision_model"), "model_type 'clip_vision_model'"),
        (CLIPTextConfig, dict(hidden_act="relu"), "hidden_act 'relu': expected one of"),
        (CLIPTextConfig, dict(eos_token_id=[1, 2]), r"eos_token_id \[1, 2\]: expected one whole number"),
        (CLIPTextConfig, dict(num_attention_heads=5), "hidden_size 24 is not a multiple of num_attention_heads 5"),
        (CLIPVisionConfig, dict(num_channels=1), "num_channels 1: expected 3"),
        (CLIPVisionConfig, dict(image_size=[20, 30]), r"image_size \[20, 30\]: expected a whole number above 0"),
        (CLIPVisionConfig, dict(patch_size=32), "patch_size 32 is larger than image_size 20"),
    ],
)
def test_configs_of_other_models(config, change, message):
    with pytest.raises(UserError, match=message):
        config.from_hf((TEXT if config is CLIPTextConfig else VISION) | change)


def test_old_two_tower_configs_are_read_as_transformers_reads_them():
    hf = dict(
        model_type="clip",
        text_config=TEXT | dict(eos_token_id=2),
        text_config_dict=dict(TEXT, eos_token_id=58),
        vision_config=VISION | dict(hidden_act="gelu"),
        vision_config_dict=None,
    )
    ours = CLIPTextConfig.from_hf(hf), CLIPVisionConfig.from_hf(hf)
    theirs = transformers.CLIPConfig(**{k: v for k, v in hf.items() if k != "model_type"})  # changes what it is given
    assert ours == (
        CLIPTextConfig.from_hf(theirs.text_config.to_dict()),
        CLIPVisionConfig.from_hf(theirs.vision_config.to_dict()),
    )
    assert (ours[0].eos_token_id, ours[1].hidden_act) == (58, "gelu")
    assert CLIPVisionConfig.from_hf(dict(model_type="clip")) == CLIPVisionConfig()
    with pytest.raises(UserError, match="model_type 'siglip_vision_model'"):
        CLIPVisionConfig.from_hf(dict(model_type="siglip", vision_config=dict(model_type="siglip_vision_model")))
