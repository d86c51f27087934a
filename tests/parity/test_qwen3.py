"""Qwen3's hidden states against transformers', random weights, float32 on CPU.

Tolerance: max |ours - theirs| <= 1e-4 of max |theirs| of each state; what is seen is about 1e-6, the rounding of float32. Every row is
compared, those of padding too: the transformer reads them.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from dynaip_jax.errors import UserError
from dynaip_jax.layers.compute import Compute
from dynaip_jax.models.qwen3 import Qwen3, Qwen3Config
from dynaip_jax.storage.tensors import TensorFile
from tools.convert_torch_weights import engine
from tools.convert_torch_weights import qwen3 as convert_qwen3

SIZES = dict(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    rope_parameters=dict(rope_type="default", rope_theta=1e6),
)
PAD = 49
STATES = (1, 2, 4)
RNG = np.random.default_rng(0)
IDS, LENGTHS = RNG.integers(0, 49, (2, 40)), (11, 40)
MASK = np.arange(40)[None] < np.array(LENGTHS)[:, None]
IDS = np.where(MASK, IDS, PAD)
OURS = np.where(MASK, IDS, ~IDS).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)).eval()
    for p in model.parameters():  # the norms too, so that none hides behind a one
        torch.nn.init.normal_(p, 0.3 if p.ndim == 1 else 0.0, 0.3)
    return model


def run_torch(model):
    with torch.no_grad():
        out = model(torch.tensor(IDS), attention_mask=torch.tensor(MASK.astype(int)), output_hidden_states=True)
    return [out.hidden_states[n].float().numpy() for n in STATES]


def ours(tensors, **compute):
    config = Qwen3Config.from_hf(SIZES, states=STATES)
    params = convert_qwen3.params_from_torch(tensors, config)
    out = jax.jit(Qwen3(config, Compute(**compute)).apply)({"params": params}, OURS)
    return np.split(np.asarray(out, np.float32), len(STATES), axis=-1), out.dtype


@pytest.mark.parametrize("kernel", ["xla", "per_head"])
def test_every_state_of_transformers(model, kernel, tmp_path):
    model.save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    assert Qwen3Config.from_hf(hf, states=STATES) == Qwen3Config.from_hf(SIZES, states=STATES)
    states, _ = ours(TensorFile(tmp_path / "model.safetensors"), attention=kernel)
    for mine, theirs in zip(states, run_torch(model), strict=True):
        assert mine.shape == theirs.shape == (2, 40, 24)
        assert np.abs(mine - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_bfloat16_is_as_near_to_float32_as_torchs_is(model):
    exact = np.stack(run_torch(model))
    half = transformers.Qwen3ForCausalLM(model.config).eval()
    half.load_state_dict(model.state_dict())
    theirs = np.stack(run_torch(half.bfloat16()))
    states, dtype = ours({n: p.numpy() for n, p in model.state_dict().items()}, dtype=jnp.bfloat16)
    assert dtype == jnp.bfloat16
    mine, theirs = (np.sqrt(np.mean((np.asarray(y) - exact) ** 2)) for y in (states, theirs))
    assert 0 < mine <= 1.5 * theirs


def test_remat_changes_no_value(model):
    tensors = {n: p.numpy() for n, p in model.state_dict().items()}
    (plain, _), (again, _) = (ours(tensors, remat=r) for r in ("none", "full"))
    np.testing.assert_allclose(plain, again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config, hidden, mlp, tied", [(Qwen3Config.of_4b(), 2560, 9728, True), (Qwen3Config.of_8b(), 4096, 12288, False)]
)
def test_full_size_names_and_shapes(config, hidden, mlp, tied):
    hf = transformers.Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=tied, rope_parameters=dict(rope_type="default", rope_theta=1e6),
    )  # fmt: skip
    assert Qwen3Config.from_hf(hf.to_dict()) == config
    assert (
        Qwen3Config.from_hf(hf.to_dict() | dict(rope_parameters=None, rope_theta=1000000)) == config
    )  # transformers 4
    with torch.device("meta"):
        theirs = {n: np.empty(p.shape, "V1") for n, p in transformers.Qwen3Model(hf).named_parameters()}
    table, target = convert_qwen3.table(config), convert_qwen3.target(config)
    kept = {
        n: x.shape for n, x in theirs.items() if not n.startswith(("norm.", *(f"layers.{k}." for k in range(27, 36))))
    }
    assert engine.source_shapes(table) == kept and set(table) == set(target)
    assert sum(np.prod(s) for s in kept.values()) == sum(np.prod(s.shape) for s in target.values())


def test_every_parameter_has_logical_axes():
    config = Qwen3Config.tiny()
    tree = jax.eval_shape(Qwen3(config).init, jax.random.key(0), **Qwen3.inputs_spec(config))["params"]
    boxes = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "names"))
    assert all(len(b.names) == len(b.value.shape) for b in boxes)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_hidden_layers=3), "num_hidden_layers 3: expected at least 4"),
        (dict(model_type="llama"), "model_type 'llama'"),
        (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e6, factor=4.0)), "rope .*yarn"),
        (dict(num_key_value_heads=3), "expected a multiple of num_key_value_heads 3"),
    ],
)
def test_other_decoders_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Qwen3Config.from_hf(SIZES | change, states=STATES)


def test_blocks_that_are_missing_are_told(model):
    tensors = {n: p.numpy() for n, p in model.state_dict().items() if not n.startswith("model.layers.3.")}
    with pytest.raises(UserError, match=r"11 missing: layers\.3\."):
        ours(tensors)
