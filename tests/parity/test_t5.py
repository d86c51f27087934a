"""The T5 encoder against transformers' torch (5.x) and Flax (4.x) encoders, random weights, float32 on CPU.

Tolerance: max |ours - theirs| <= 1e-5 of max |theirs|; what is seen is about 6e-7, the rounding of float32. Lengths
reach past the last bucket of relative positions.
"""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dynaip_jax.errors import UserError
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.t5 import T5Block, T5Config, T5Encoder, relative_position_bucket
from dynaip_jax.storage.tensors import TensorFile
from tests.parity.flax_goldens import T5, make_goldens
from tools.convert_torch_weights import clip as convert_clip
from tools.convert_torch_weights import engine
from tools.convert_torch_weights import t5 as convert_t5

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, T5["vocab_size"], (2, 150)).astype(np.int32)


def assert_close(ours, theirs, tolerance=1e-5):
    theirs = np.asarray(theirs)
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**T5)).eval()
    for p in model.parameters():  # the norms too, so that none hides behind a one
        torch.nn.init.normal_(p, 0.3 if p.ndim == 1 else 0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def tensors(model):
    return {n: p.numpy() for n, p in model.state_dict().items()}


def run_torch(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).last_hidden_state.float().numpy()


def ours(config, tensors, ids=IDS, **compute):
    return jax.jit(T5Encoder(config, Compute(**compute)).apply)(
        {"params": convert_t5.params_from_torch(tensors, config)}, ids
    )


@pytest.mark.parametrize("kernel", ["xla", "per_head"])
def test_states_of_torch(model, tensors, kernel, tmp_path):
    model.save_pretrained(tmp_path)
    config = T5Config.from_hf(json.loads((tmp_path / "config.json").read_text()))
    exact = run_torch(model)
    assert_close(ours(config, TensorFile(tmp_path / "model.safetensors"), attention=kernel), exact)
    assert exact.shape == (2, 150, T5["d_model"])


def test_states_of_flax(tmp_path):
    folder = make_goldens(tmp_path, "t5") / "t5"
    golden = np.load(folder / "goldens.npz")
    config = T5Config.from_hf(json.loads((folder / "config.json").read_text()))
    assert_close(
        ours(config, convert_clip.from_flax(folder / "flax_model.msgpack"), golden["input_ids"]), golden["last"]
    )


@pytest.mark.parametrize("buckets,distance", [(32, 128), (8, 20)])
def test_buckets_of_torch(buckets, distance):
    position = torch.arange(2000)
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        position[None, :] - position[:, None], num_buckets=buckets, max_distance=distance
    )
    np.testing.assert_array_equal(relative_position_bucket(2000, buckets, distance), theirs)


def test_bfloat16_is_as_near_to_float32_as_torchs_is(model, tensors):
    exact = run_torch(model)
    half = transformers.T5EncoderModel(model.config).eval()
    half.load_state_dict(model.state_dict())
    theirs = run_torch(half.bfloat16())
    out = ours(T5Config.from_hf(T5), tensors, dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    mine, theirs = (np.sqrt(np.mean((np.asarray(y, np.float32) - exact) ** 2)) for y in (out, theirs))
    assert 0 < mine <= 1.5 * theirs


def test_float16_takes_a_residual_stream_past_its_range(tensors):
    tensors = dict(tensors)
    for name in tensors:
        if name.endswith("DenseReluDense.wo.weight"):
            tensors[name] = tensors[name] * 1e5
    config = T5Config.from_hf(T5)
    params = convert_t5.params_from_torch(tensors, config)
    first = jax.tree.map(lambda p: p[0], params["blocks"])
    stream, _ = T5Block(config, Compute()).apply(
        {"params": first}, params["shared"]["embedding"][IDS], np.zeros((1, 3, 150, 150))
    )
    assert np.abs(stream).max() > np.finfo(np.float16).max
    exact = ours(config, tensors)
    half = ours(T5Config.from_hf(T5), tensors, dtype=jnp.float16)
    assert half.dtype == jnp.float16
    assert_close(half.astype(jnp.float32), exact, 1e-2)


def test_remat_changes_no_value(tensors):
    plain, again = (ours(T5Config.from_hf(T5), tensors, remat=r) for r in ("none", "full"))
    np.testing.assert_allclose(plain, again, rtol=1e-5, atol=1e-6)


def test_full_size_names_and_shapes():
    config = T5Config.xxl()
    hf = transformers.T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    assert T5Config.from_hf(hf.to_dict()) == config
    with torch.device("meta"):
        theirs = {n: tuple(p.shape) for n, p in transformers.T5EncoderModel(hf).named_parameters()}
    table, target = convert_t5.table(config), convert_t5.target(config)
    assert engine.source_shapes(table) == theirs
    assert set(table) == set(target)
    assert sum(np.prod(s) for s in theirs.values()) == sum(np.prod(s.shape) for s in target.values())


def test_every_parameter_has_logical_axes():
    config = T5Config.tiny()
    tree = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), **T5Encoder.inputs_spec(config))["params"]
    boxes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(len(b.names) == len(b.value.shape) for b in boxes)
    q = tree["blocks"]["q"]["kernel"]
    assert q.names == ("layers", "embed", "heads", "head_dim") and q.value.shape == (2, 32, 4, 8)


def test_copies_of_the_embedding_and_the_decoder_are_known(tensors):
    config = T5Config.from_hf(T5)
    plain = convert_t5.params_from_torch(tensors, config)
    alone = {n: x for n, x in tensors.items() if n not in ("shared.weight", "encoder.embed_tokens.weight")}
    shared = tensors["shared.weight"]
    company = {"decoder.block.0.layer.0.SelfAttention.q.weight": np.ones(2), "lm_head.weight": shared}
    for names in (
        ("shared.weight",),
        ("encoder.embed_tokens.weight",),
        ("shared.weight", "encoder.embed_tokens.weight"),
    ):
        again = convert_t5.params_from_torch(alone | company | dict.fromkeys(names, shared), config)
        jax.tree.map(np.testing.assert_array_equal, plain, again)


def test_mismatches_are_named(tensors):
    config = T5Config.from_hf(T5)
    name = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
    with pytest.raises(UserError, match=rf"t5: .*1 missing: {name} \[40, 24\].*1 unexpected: surplus \[2\]"):
        convert_t5.params_from_torch({n: x for n, x in tensors.items() if n != name} | {"surplus": np.zeros(2)}, config)
    with pytest.raises(UserError, match=r"1 missing: shared.weight \[60, 24\]"):
        alone = {n: x for n, x in tensors.items() if n not in ("shared.weight", "encoder.embed_tokens.weight")}
        convert_t5.params_from_torch(alone, config)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(feed_forward_proj="relu"), "feed_forward_proj 'relu': expected 'gated-gelu'"),
        (dict(dense_act_fn="silu"), "dense_act_fn 'silu': expected 'gelu_new'"),
        (dict(model_type="umt5"), "model_type 'umt5': expected 't5'"),
        (dict(is_decoder=True), "is_decoder True: expected False"),
        (dict(num_heads=0), "num_heads 0: expected a whole number above 0"),
        (dict(d_ff="40"), "d_ff '40': expected a whole number above 0"),
        (dict(relative_attention_num_buckets=6), "relative_attention_num_buckets 6: expected a multiple of 4"),
        (dict(relative_attention_max_distance=8), "relative_attention_max_distance 8: expected more than a quarter"),
    ],
)
def test_configs_of_other_models(change, message):
    with pytest.raises(UserError, match=message):
        T5Config.from_hf(T5 | change)


def test_feed_forward_is_ungated_where_the_config_does_not_say():
    with pytest.raises(UserError, match="feed_forward_proj 'relu'"):
        T5Config.from_hf({k: v for k, v in T5.items() if k != "feed_forward_proj"})


@pytest.mark.parametrize("change", [dict(remat="some"), dict(attention="flash")])
def test_unknown_ways_to_compute(change):
    with pytest.raises(ValueError, match="expected one of"):
        Compute(**change)
