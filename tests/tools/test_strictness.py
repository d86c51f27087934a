"""The converter on sources that someone else made: sizes that never end, names that lie, files that hold something else."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from dynaip_jax.commandline import run_cli
from dynaip_jax.errors import UserError
from dynaip_jax.models.flux import FluxConfig
from dynaip_jax.models.vae import VAEConfig
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.testing import _tokenizers
from tests.mutation.readers import CLIPTextConfigFile, T5ConfigFile, TransformerConfig, VAEConfigFile
from tools.convert_torch_weights import clip, engine, flux, vae
from tools.convert_torch_weights.__main__ import main
from tools.convert_torch_weights.flux_layout import LAYOUT

HEAD = FluxConfig(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1)


def convert(*words):
    return run_cli(main, [str(w) for w in words])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A diffusers folder of zeros that converts and loads."""
    folder = tmp_path_factory.mktemp("source")
    for part in (TransformerConfig(), VAEConfigFile(), T5ConfigFile(), CLIPTextConfigFile()):
        part.make(folder)
    (folder / "made").mkdir()
    made = _tokenizers(folder / "made")
    for name, theirs in LAYOUT.tokenizers.items():
        shutil.copytree(made[name], folder / theirs)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(use_dynamic_shifting=True)))
    (folder / "model_index.json").write_text(json.dumps(dict(_class_name="FluxPipeline")))
    return folder


@pytest.fixture
def mine(source, tmp_path):
    """A copy of it to spoil, as a path and a function that changes a JSON file in it."""
    shutil.copytree(source, tmp_path / "source")

    def change(file, **changes):
        path = tmp_path / "source" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return tmp_path / "source", change


def test_the_folder_itself_converts(source, tmp_path, capsys):
    assert convert("--source", source, "--out", tmp_path / "b") == 0
    assert "lack" not in capsys.readouterr().err
    bundle = Bundle.open(tmp_path / "b", ("flux",))
    assert bundle.part("transformer") and bundle.part("tokenizers")


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("text_encoder_2/config.json", dict(num_heads=0), "num_heads 0: expected a whole number above 0"),
        ("text_encoder_2/config.json", dict(num_layers=10**9), "num_layers 1000000000: expected at most 1024"),
        ("text_encoder_2/config.json", dict(d_ff="64"), "d_ff '64': expected a whole number"),
        (
            "text_encoder/config.json",
            dict(text_config=[1], model_type="clip"),
            "text_config: found list; expected an object",
        ),
        ("transformer/config.json", dict(num_layers=10**9), "depth 1000000000: expected at most 1024"),
        ("transformer/config.json", dict(num_attention_heads=[4]), "num_attention_heads .4.: expected a whole number"),
        (
            "transformer/config.json",
            dict(num_attention_heads=0),
            "num_heads 0: expected a whole number above 0|hidden_size 0",
        ),
        ("transformer/config.json", dict(axes_dims_rope=[-16, 32, 0]), "axes_dim .*expected at least 1"),
        ("transformer/config.json", dict(guidance_embeds="no"), "guidance_embed 'no': expected true or false"),
        ("vae/config.json", dict(layers_per_block=10**9), "num_res_blocks 1000000000: expected at most 16"),
        ("vae/config.json", dict(block_out_channels=[32] * 2000), "ch_mult|down_block_types"),
        ("vae/config.json", dict(block_out_channels="64"), "block_out_channels .*expected multiples of the first"),
        (
            "vae/config.json",
            dict(scaling_factor=1e400),
            "scale_factor inf: expected a finite number|not readable as JSON",
        ),
        (
            "scheduler/scheduler_config.json",
            dict(shift="x"),
            "scheduler_config.json: shift 'x': expected a finite number",
        ),
        (
            "tokenizer/tokenizer_config.json",
            dict(model_max_length=[77]),
            "model_max_length .*expected a number of tokens",
        ),
        ("tokenizer/tokenizer_config.json", dict(auto_map={}), "asks for code of its own"),
        ("model_index.json", dict(_class_name=["x"]), "unknown family None"),
    ],
)
def test_configs_are_checked_before_anything_is_built(mine, tmp_path, capsys, dry_run, file, changes, message):
    source, change = mine
    change(file, **changes)
    assert convert("--source", source, "--out", tmp_path / "b", *dry_run) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(": converting")]
    assert len(lines) == 1 and re.search(message, lines[0]) and len(lines[0]) <= 310, lines
    assert not (tmp_path / "b").exists()


def test_a_length_of_text_that_no_machine_holds(source, tmp_path, capsys):
    assert convert("--source", source, "--out", tmp_path / "b", "--t5-length", 10**9) == 2
    assert "--t5-length 1000000000: expected at least 1 and at most 16384" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, {}, {"tokenizer.json": "{"}, {"tokenizer_config.json": "{}"}])
def test_a_bundle_whose_tokenizers_cannot_be_read_is_not_made(mine, tmp_path, capsys, content):
    shutil.rmtree(mine[0] / "tokenizer_2")
    if content is not None:
        (mine[0] / "tokenizer_2").mkdir()
        for name, text in content.items():
            (mine[0] / "tokenizer_2" / name).write_text(text)
    assert convert("--source", mine[0], "--out", tmp_path / "b") == 2
    assert "tokenizer_2" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_what_a_bundle_lacks_is_said(tmp_path, capsys):
    save_file(zeros(vae.table(VAEConfig.tiny(), "bfl")), tmp_path / "ae.safetensors")
    for words in ((), ("--dry-run",)):
        assert (
            convert(
                "--source",
                tmp_path / "ae.safetensors",
                "--out",
                tmp_path / "b",
                *words,
                *(["--overwrite"] * bool(words)),
            )
            == 0
        )
        assert (
            "note: the sources lack transformer, t5, clip_text, clip tokenizer, t5 tokenizer;"
            in capsys.readouterr().err
        )


def zeros(table, dtype=np.float32):
    return {n: np.zeros(s, dtype) for n, s in engine.source_shapes(table).items()}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("double_blocks.999999999.x", "double_blocks.999999999 among 2 of double_blocks.N"),
        ("single_blocks.x.y", "single_blocks.x among 2"),
        (f"single_blocks.{'9' * 5000}.y", "single_blocks.999"),
        ("double_blocks.00.y", "double_blocks.00 among 2"),
    ],
)
def test_blocks_are_counted_and_not_believed(tmp_path, capsys, extra, message):
    save_file(zeros(flux.table(HEAD, "bfl")) | {extra: np.zeros(1, np.float32)}, tmp_path / "f.safetensors")
    assert convert("--source", tmp_path / "f.safetensors", "--out", tmp_path / "b", "--dry-run") == 2
    assert message in capsys.readouterr().err


def test_whole_numbers_are_no_weights(tmp_path, capsys):
    tensors = zeros(vae.table(VAEConfig.tiny(), "bfl"))
    name = "decoder.conv_out.bias"
    save_file(tensors | {name: tensors[name].astype(np.int32)}, tmp_path / "ae.safetensors")
    for words in ((), ("--dry-run",)):
        assert convert("--source", tmp_path / "ae.safetensors", "--out", tmp_path / "b", *words) == 2
        assert f"vae: {name} holds int32; expected weights in float16, bfloat16" in capsys.readouterr().err


def test_one_tensor_under_two_names(tmp_path, capsys):
    tensors = zeros(flux.table(HEAD, "bfl"))
    both = tensors | {f"model.diffusion_model.{n}": x for n, x in tensors.items()}
    save_file(both, tmp_path / "f.safetensors")
    assert convert("--source", tmp_path / "f.safetensors", "--out", tmp_path / "b") == 2
    assert "stands with and without the prefix model.diffusion_model." in capsys.readouterr().err


def test_no_leaf_of_a_flax_file_is_lost(tmp_path):
    import msgpack
    from flax.serialization import msgpack_serialize

    path, x = tmp_path / "flax_model.msgpack", np.ones(2, np.float32)

    def refused(data, message):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            clip.from_flax(path)

    one = msgpack_serialize({"a": x})
    refused(b"\x82" + one[1:] * 2, "a map has a name twice")
    refused(msgpack_serialize({"m": {"scale": x, "kernel": x}}), "two leaves are m.weight")
    refused(msgpack_serialize({"m": {"a": x}, "m.a": x}), "two leaves are m.a")
    refused(msgpack_serialize({"a": x, "b": {}}), "holds no tree of arrays")
    refused(msgpack.packb({1: msgpack.ExtType(1, one[-20:])}, strict_types=True), "not a whole Flax msgpack")
    refused(b"\x81\xa1a" * 5000 + b"\xc0", "not a whole Flax msgpack|no tree")
    shape = msgpack.packb(((10**9, 10**9), "float32", b"\0" * 8))
    refused(msgpack.packb({"a": msgpack.ExtType(1, shape)}), "an array of 8 bytes")
    named = msgpack.packb(((1,), "object", b"\0" * 8))
    refused(msgpack.packb({"a": msgpack.ExtType(1, named)}), "dtype b'object'")
