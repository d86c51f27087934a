"""LoRAs of every naming and kind against their formulas in float64; and what is refused, by its name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dynaip_jax.adapters.lora import Scaled, gather, merge
from dynaip_jax.adapters.lora_file import read_changes
from dynaip_jax.errors import UserError
from dynaip_jax.families.flux_names import public_names
from dynaip_jax.models.clip import CLIPTextConfig
from dynaip_jax.models.flux import FluxConfig
from dynaip_jax.models.t5 import T5Config
from tests.adapters import lora_files
from tests.adapters.lora_files import CONFIG, FILES, IN, MLP, NORM, QKV, File, W
from tests.conftest import FIXTURES
from tools.convert_torch_weights import clip, flux, t5

NAMES = public_names(CONFIG, CLIPTextConfig.tiny(), T5Config.tiny())
OURS = NAMES.components["transformer"]


@pytest.fixture(scope="module")
def base():
    return lora_files.bfl_weights(OURS)


@pytest.fixture(scope="module")
def params(base):
    return flux.params_from_torch(base, CONFIG)


def changes_of(file):
    def read(name):
        return np.asarray(file.tensors[name], np.float32)

    return read_changes("my.safetensors", Shapes(file.tensors), file.metadata, NAMES, read)


class Shapes(dict):
    def shape(self, name):
        return np.shape(self[name])


def merged(params, file, scale=1.0):
    asked = changes_of(file)
    assert not asked.notes
    return merge(params, OURS, [Scaled(change, scale) for change in asked.changes])


@pytest.mark.parametrize("kind", FILES)
def test_merged_weights_are_those_of_the_formula(base, params, kind):
    """At scale 1, and at 0.4 between the base and that; what the file does not name stays as it is."""
    file = FILES[kind](base)
    expected = flatten_dict(flux.params_from_torch(file.weights, CONFIG), sep="/")
    start = flatten_dict(params, sep="/")
    for scale in (1.0, 0.4):
        found = flatten_dict(merged(params, file, scale), sep="/")
        for path, x in found.items():
            exact = start[path] + scale * (expected[path] - start[path])
            np.testing.assert_allclose(x, exact, atol=2e-6 * np.abs(exact).max(), err_msg=path)
            assert np.array_equal(x, start[path]) == np.array_equal(expected[path], start[path]), path


def test_several_act_one_after_the_other_and_are_rounded_once(base, params):
    first, second = (FILES[kind](base) for kind in ("kohya", "diffusers"))
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    scaled = [Scaled(c, s) for file, s in ((first, 0.5), (second, -1.0)) for c in changes_of(file).changes]
    found = merge(half, OURS, scaled)
    alone = merge(jax.tree.map(lambda x: np.asarray(x, np.float32), half), OURS, scaled)
    for path, x in flatten_dict(found, sep="/").items():
        assert x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x, flatten_dict(alone, sep="/")[path].astype(jnp.bfloat16))


def test_scale_zero_is_the_base(base, params):
    before = flatten_dict(params, sep="/")
    for kind in FILES:
        after = flatten_dict(merged(params, FILES[kind](base), 0.0), sep="/")
        assert all(x is before[path] for path, x in after.items())


def test_a_file_of_one_part_takes_what_it_names(base, params):
    """Only to_k of one block: a third of the rows of one matrix."""
    file = File(base)
    down, up = file.factors(W, W)
    key = "transformer.single_transformer_blocks.1.attn.to_k"
    file.tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    new = merged(params, file)["single_blocks"]["attn"]["qkv"]["kernel"]
    old = params["single_blocks"]["attn"]["qkv"]["kernel"]
    np.testing.assert_allclose((new - old)[1, :, 1].reshape(W, W).T, up @ down, atol=1e-5)
    np.testing.assert_array_equal(np.delete(new, 1, axis=2), np.delete(old, 1, axis=2))


@pytest.mark.parametrize("prefix", ["lora_te1_", "lora_te3_", "lora_te2_", "text_encoder.", "t5."])
def test_text_encoders(prefix):
    """Each public name is the leaf that the converter makes of it."""
    module, name, part = (
        (t5, "encoder.block.1.layer.1.DenseReluDense.wo", "t5")
        if "te2" in prefix or "te3" in prefix or "t5" in prefix
        else (clip, "text_model.encoder.layers.1.self_attn.q_proj", "clip_text")
    )
    names = NAMES.components[part]
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(size=t.shape).astype(np.float32) for n, t in names.tensors.items()}
    convert = t5.params_from_torch if module is t5 else clip.text_params_from_torch
    config = T5Config.tiny() if module is t5 else CLIPTextConfig.tiny()
    params = convert(weights, config)
    out, in_ = names.modules[name].shape
    down, up = rng.normal(size=(2, in_)).astype(np.float32), rng.normal(size=(out, 2)).astype(np.float32)
    key = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
    file = File({})
    file.tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    (change,) = changes_of(file).changes
    assert change.component == part
    expected = convert(weights | {f"{name}.weight": weights[f"{name}.weight"] + up @ down}, config)
    for x, y in zip(
        *(jax.tree.leaves(tree) for tree in (merge(params, names, [Scaled(change, 1.0)]), expected)), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_every_value_of_the_full_size_models_has_one_public_name():
    """FLUX.1-dev with its text encoders: BFL's own list of names and shapes, and each leaf covered once."""
    names = public_names(FluxConfig.dev(), CLIPTextConfig.large(), T5Config.xxl())
    listed = json.loads((FIXTURES / "full_size_keys_bfl.json").read_text())
    listed = listed.get("transformer") or listed.get("flux") or next(iter(listed.values()))
    ours = {
        name.replace("norm.weight", "norm.scale"): t.shape
        for name, t in names.components["transformer"].tensors.items()
    }
    assert ours == {name: tuple(shape) for name, shape in listed.items()}
    targets = dict(
        transformer=flux.target(FluxConfig.dev()),
        clip_text=clip.text_target(CLIPTextConfig.large()),
        t5=t5.target(T5Config.xxl()),
    )
    for part, target in targets.items():
        held = dict.fromkeys(target, 0)
        for tensor in names.components[part].tensors.values():
            for piece in tensor.pieces:
                rows, columns = piece.rows, piece.columns or (0, 1)
                held[piece.leaf] += (rows[1] - rows[0]) * (columns[1] - columns[0])
        assert held == {path: int(np.prod(x.shape)) for path, x in target.items()}


def test_gathered_tensors_are_the_public_ones(base, params):
    leaves = {path: np.asarray(x) for path, x in flatten_dict(params, sep="/").items()}
    for name, tensor in OURS.tensors.items():
        np.testing.assert_array_equal(
            gather(leaves, tensor), base.get(name, base.get(name.replace(".weight", ".scale")))
        )


# --- what is refused


def refused(base, change, kind="kohya"):
    file = FILES[kind](base)
    change(file.tensors, file)
    with pytest.raises(UserError) as error:
        changes_of(file)
    assert str(error.value).startswith("my.safetensors: ") and len(str(error.value)) <= 300
    return str(error.value)


KEY = f"lora_unet_{QKV.replace('.', '_')}"


@pytest.mark.parametrize(
    "name, said",
    [
        ("lora_unet_input_blocks_4_1_attn1_to_q.lora_down.weight", "made for Stable Diffusion or SDXL"),
        ("transformer.joint_blocks.0.x_block.attn.qkv.lora_A.weight", "made for Stable Diffusion 3"),
        ("diffusion_model.double_stream_modulation_img.lin.lora_A.weight", "made for FLUX.2"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "made for Wan"),
        ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", "an image-prompt adapter, which is for `adapter`"),
        (f"{KEY}.oft_blocks", "is of OFT, which is not read"),
        (f"{KEY}.lora_mid.weight", "is of a convolution"),
        ("lora_unet_double_blocks_7_img_attn_qkv.alpha", "1 tensors that belong to no layer of this model, the first lora_unet_double_blocks_7"),
    ],
)  # fmt: skip
def test_tensors_of_no_layer_are_named(base, name, said):
    def add(tensors, _):
        tensors[name] = np.zeros((2, 2), np.float32)

    assert said in refused(base, add)


def without(name):
    return lambda tensors, _: tensors.pop(name)


def with_(name, x):
    return lambda tensors, _: tensors.update({name: np.asarray(x, np.float32)})


@pytest.mark.parametrize(
    "change, kind, said",
    [
        (without(f"{KEY}.lora_up.weight"), "kohya", f"{KEY}.lora_down.weight stands without its other half"),
        (without(f"lora_unet_{QKV.replace('.', '_')}.hada_w2_b"), "LoHa", "stands without its other half"),
        (with_(f"{KEY}.lora_up.weight", np.zeros((3 * W, 5))), "kohya", "does not fit its other half"),
        (with_(f"diffusion_model.{QKV}.lora_A.weight", np.zeros((3, 9))), "BFL's names", f"is for [{3 * W}, 9], the layer of this model has [{3 * W}, {W}]"),
        (with_(f"{KEY}.alpha", np.zeros(2)), "kohya", "has 2 numbers; expected one"),
        (with_(f"{KEY}.alpha", np.inf), "kohya", "expected a finite number"),
        (with_(f"transformer.{QKV}.lora_A.weight", np.zeros((3, W))), "BFL's names", "are one tensor under two names"),
        (with_(f"diffusion_model.{IN}.lora_A.weight", np.zeros((3, 128))), "BFL's names", "a control LoRA, which reads a control picture"),
        (with_(f"diffusion_model.{QKV}.dora_scale", np.zeros((1, 5))), "DoRA of inputs", f"expected [{3 * W}] or [1, {W}]"),
        (with_(f"diffusion_model.{NORM}.scale.diff", np.zeros(3)), "differences", "is for [3], the layer of this model has [16]"),
        (with_(f"diffusion_model.{MLP}.diff", np.zeros((4 * W, W))), "differences", "replaces what other tensors change"),
        (with_(f"diffusion_model.{MLP}.reshape_weight", (4 * W, 2)), "differences", f"is for [{4 * W}, 2]"),
        (lambda tensors, file: file.metadata.update(lora_adapter_metadata="{"), "kohya", "in its header cannot be read"),
        (lambda tensors, file: file.metadata.update(lora_adapter_metadata='{"transformer.alpha_pattern": {"(a+)+": 1}}'), "diffusers", "no layer's name"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(base, change, kind, said):
    assert said in refused(base, change, kind)


def test_whole_weights_are_no_lora(base):
    file = File(base)
    file.tensors = dict(base)
    with pytest.raises(UserError, match="my.safetensors: holds whole weights, no LoRA; expected a LoRA for FLUX.1"):
        changes_of(file)


def test_embeddings_of_words_are_told(base):
    file = FILES["kohya"](base)
    file.tensors["bundle_emb.my token.clip_l"] = np.zeros((2, 4), np.float32)
    asked = changes_of(file)
    assert len(asked.changes) == len(lora_files.LINEARS) and "(my token) are not used" in asked.notes[0]


def test_weights_that_outgrow_their_numbers_are_told(base, params):
    file = FILES["kohya"](base)
    for half in ("down", "up"):
        file.tensors[f"{KEY}.lora_{half}.weight"] *= np.float32(1e25)
    with pytest.raises(UserError, match="makes weights that are not finite at scale 1; pass a smaller scale"):
        merged(params, file)


def test_magnitudes_as_of_convolutions_and_numbers_beyond_floats(base, params):
    plain, wide = (FILES["DoRA of inputs"](base) for _ in range(2))
    for name in [name for name in wide.tensors if "magnitude" in name or "dora_scale" in name]:
        wide.tensors[name] = np.reshape(wide.tensors[name], (*np.shape(wide.tensors[name]), 1, 1))
    one, other = (flatten_dict(merged(params, file), sep="/") for file in (plain, wide))
    assert all(np.array_equal(one[leaf], other[leaf]) for leaf in one)
    file = FILES["diffusers, header"](base)
    huge = {"transformer.lora_alpha": 10**400, "transformer.alpha_pattern": {}}
    header = json.loads(file.metadata["lora_adapter_metadata"]) | huge
    file.metadata.update(lora_adapter_metadata=json.dumps(header))
    with pytest.raises(UserError, match=r"lora_alpha in its header is 1000.*; expected a finite number"):
        changes_of(file)
