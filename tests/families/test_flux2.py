"""FLUX.2's family: schedule, tokens, text."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from transformers import AutoTokenizer

from dynaip_jax.errors import UserError
from dynaip_jax.families import flux2
from dynaip_jax.families.chat import ChatTokenizer
from dynaip_jax.families.registry import published
from dynaip_jax.testing import chat_tokenizer, tiny_family
from dynaip_jax.types import TextCondition

SETTINGS = dict(use_dynamic_shifting=True, shift=3.0, base_image_seq_len=256, max_image_seq_len=4096, max_shift=1.15)


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 4300, 4301, 8192])
@pytest.mark.parametrize("steps", [1, 4, 12, 50, 200])
def test_times_of_diffusers(tokens, steps):
    assert flux2.shift(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), abs=1e-9)
    scheduler = FlowMatchEulerDiscreteScheduler(**SETTINGS)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    np.testing.assert_allclose(tiny_family("flux2").times(steps, tokens), scheduler.sigmas.numpy(), atol=1e-6)


def test_training_times_are_shifted_as_with_many_steps():
    family = tiny_family("flux2")
    assert family.shift(1024) == pytest.approx(np.exp(compute_empirical_mu(1024, 200)))


def test_packing_has_an_inverse_and_positions():
    family = tiny_family("flux2")
    z = np.random.default_rng(0).normal(size=(2, 128, 3, 5)).astype(np.float32)
    tokens = family.pack(z)
    assert tokens.shape == (2, 15, 128) and family.latent(48, 80) == (128, 3, 5) and family.tokens((3, 5)) == 15
    np.testing.assert_array_equal(tokens[1, 7], z[1, :, 1, 2])
    np.testing.assert_array_equal(family.unpack(tokens, 3, 5), z)
    assert flux2.positions(3, 5, 20)[0, 7].tolist() == [20, 1, 2, 0]


def test_references_stand_where_diffusers_puts_them():
    family, sizes = tiny_family("flux2"), ((3, 5), (2, 2), (4, 1))
    theirs = Flux2KleinPipeline._prepare_image_ids([torch.zeros(1, 128, *size) for size in sizes])
    ours = [family.reference_ids(number, *size) for number, size in enumerate(sizes)]
    np.testing.assert_array_equal(np.concatenate(ours, axis=1), theirs.numpy())


def test_text_stands_where_diffusers_puts_it():
    theirs = Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, 7, 3))
    np.testing.assert_array_equal(flux2.text_positions(7), theirs.numpy())


def test_fresh_parameters_have_no_velocity():
    """With them training from scratch starts; the text and the time count once they are trained."""
    family = tiny_family("flux2")
    params = jax.jit(lambda key: family.init_params("transformer", key))(jax.random.key(0))
    tokens, states = (jax.random.normal(jax.random.key(n), (1, 4, width)) for n, width in enumerate((128, 48)))
    run = jax.jit(lambda p: family.velocity(p, tokens, jnp.full(1, 0.5), TextCondition(states, None), (2, 2)))
    fresh = family.fresh(params)
    assert not run(fresh).any() and np.abs(run(params)).max() > 1e-3
    assert not any(x.any() for name, x in fresh.items() if "modulation" in name for x in jax.tree.leaves(x))
    assert fresh["time_in"]["in_layer"]["kernel"].any()


def test_published_presets_say_what_they_take():
    bundle = published("flux2-klein-base-4b")
    assert bundle.manifest["defaults"] == dict(steps=50, true_cfg=4.0, guidance=None, height=1024, width=1024)
    assert published("flux2-klein-9b").manifest["defaults"]["steps"] == 4
    assert published("flux2-klein-9b").manifest["components"]["transformer"]["config"]["hidden_size"] == 4096


# --- the chat template


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


PROMPTS = [
    "a star",
    "",
    " two  words\n",
    "<|im_end|>\n<think>",
    "{{ messages }} {% raw %}",
    "\U0001f31f user assistant",
]


def test_ids_are_those_of_the_template(folder):
    """As diffusers' pipeline makes them, a prompt at a time."""
    tokenizer, ours = AutoTokenizer.from_pretrained(folder), ChatTokenizer.read(folder, 64)
    ids = ours.ids(PROMPTS)["qwen3"]
    assert ids.shape == (len(PROMPTS), 64) and ids.dtype == np.int32
    for prompt, row in zip(PROMPTS, ids, strict=True):
        text = tokenizer.apply_chat_template(
            [dict(role="user", content=prompt)], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert text == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        theirs = tokenizer(text, padding="max_length", truncation=True, max_length=64)
        seen = np.array(theirs["attention_mask"]) == 1
        np.testing.assert_array_equal(np.where(row < 0, ~row, row), theirs["input_ids"])
        np.testing.assert_array_equal(row >= 0, seen)
    again = pickle.loads(pickle.dumps(ours))
    np.testing.assert_array_equal(again.ids(PROMPTS)["qwen3"], ids)


def test_words_stand_in_their_rows_of_the_template(folder):
    tokenizer = ChatTokenizer.read(folder, 64)
    weights = tokenizer.words("a user, a star", ["star", "user"])
    text = "<|im_start|>user\na user, a star"
    begin = len("user\n") + 1  # a token for the first mark, then one a letter
    rows = [np.flatnonzero(row).tolist() for row in weights]
    assert rows == [[begin + n for n in (10, 11, 12, 13)], [begin + n for n in (2, 3, 4, 5)]]
    assert text[len("<|im_start|>") + 5 + 10 :] == "star" and weights.sum() == pytest.approx(2)
    with pytest.raises(UserError, match="'star' lie beyond the 20 tokens that Qwen3 takes"):
        ChatTokenizer.read(folder, 20).words("a user and a star", ["star"])


def test_what_is_cut_off_is_told(folder):
    assert ChatTokenizer.read(folder, 64).cut("a star") == {}
    assert ChatTokenizer.read(folder, 12).cut("a red star") == {"Qwen3": "star"}
    assert ChatTokenizer.read(folder, 12).cut("a") == {"Qwen3": "sistant\n<think>\n\n</think>"}
    assert ChatTokenizer.read(folder, 64).unknown("any \U0001f31f byte") == {}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(chat_template=None), "chat template cannot be used"),
        (dict(chat_template="{{ nothing.at.all }}"), "chat template cannot be used"),
        (dict(chat_template="{{ messages[0].content | upper }}"), "chat template cannot be used"),
        (dict(chat_template="{{ messages[0].content }}{{ messages[0].content }}"), "chat template cannot be used"),
        (dict(tokenizer_class="BertTokenizer"), "tokenizer_class 'BertTokenizer'"),
    ],
)
def test_a_tokenizer_that_is_not_for_chats_is_refused(folder, tmp_path, change, message):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text()) | change
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(UserError, match=message):
        ChatTokenizer.read(tmp_path, 64)


def test_parts_that_do_not_belong_together_are_refused():
    family = tiny_family("flux2")
    family.check("here")
    for changes, message in (
        (dict(qwen3=flux2.Qwen3Config.tiny(hidden_size=32)), "qwen3 width is 96, the transformer takes 48"),
        (dict(vae=flux2.Flux2VAEConfig.tiny(z_channels=4)), "vae latent channels x 4 is 16"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_family("flux2", **changes).check("here")
    with pytest.raises(UserError, match="expected a qwen3_length of 1 to"):
        tiny_family("flux2", text=dict(t5_length=4)).check("here")
