"""Files of weights as people have them: known by what they hold, read right, or refused by their names."""

import dataclasses
import json
import re
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dynaip_jax.errors import UserError
from dynaip_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from dynaip_jax.models.flux import FluxConfig
from dynaip_jax.models.siglip import SiglipVisionConfig
from dynaip_jax.models.t5 import T5Config
from dynaip_jax.models.vae import VAEConfig
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.testing import _tokenizers
from tests.mutation.readers import TransformerConfig
from tests.tools.test_convert import HEAD, convert, random_tensors
from tests.tools.test_strictness import source  # noqa: F401  (a fixture)
from tools.convert_torch_weights import clip, clip_files, engine, flux, hub, opening, quantised, siglip, t5, vae
from tools.convert_torch_weights.flux_layout import LAYOUT, single
from tools.convert_torch_weights.gguf_file import GGUFFile
from tools.convert_torch_weights.sources import Sources

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def opened(tensors, path, metadata=None):
    save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, path, metadata)
    return opening.open_weights(path).tensors


@pytest.fixture(scope="module")
def bfl():
    return random_tensors(flux.table(HEAD, "bfl"), ml_dtypes.bfloat16)


def test_fp8_raw_and_scaled(tmp_path):
    q = np.arange(48, dtype=np.uint8).reshape(6, 8)
    rows = np.linspace(0.5, 2, 6, dtype=np.float32)[:, None]
    for kind in (E4M3, E5M2):
        values = q.view(kind).astype(np.float32)
        for beside, scale in (
            ({}, 1),
            ({"a.scale_weight": np.float32([0.25]), "scaled_fp8": np.zeros(2, kind)}, 0.25),
            ({"a.weight_scale": np.float32(3), "a.input_scale": np.float32(0.1)}, 3),
            ({"a.weight_scale": rows}, rows),
            ({"a.weight_scale": rows[:, 0]}, rows),
        ):
            file = opened({"a.weight": q.view(kind), "b": np.ones(3, np.float32)} | beside, tmp_path / "f.safetensors")
            assert set(file) == {"a.weight", "b"} and len(file) == 2
            assert file.dtype("a.weight") == ml_dtypes.bfloat16 and file.shape("a.weight") == (6, 8)
            np.testing.assert_array_equal(file["a.weight"], values * np.float32(scale))
            np.testing.assert_array_equal(file.part("a.weight", (slice(2, 5),)), (values * np.float32(scale))[2:5])


def test_bitsandbytes(tmp_path):
    """The definitions: code[nibble] * absmax, high nibble first; nested absmax; int8 * SCB / 127."""
    rng = np.random.default_rng(0)
    code, outer_code = np.sort(rng.normal(size=16)).astype(np.float32), np.sort(rng.normal(size=256)).astype(np.float32)
    nibbles = rng.integers(0, 16, 6 * 50)
    packed = (nibbles[0::2] << 4 | nibbles[1::2]).astype(np.uint8)[:, None]
    state = dict(quant_type="nf4", blocksize=64, shape=[6, 50], dtype="bfloat16")
    absmax = rng.uniform(1, 2, 5).astype(np.float32)  # 300 values: the last block is not full
    beside = {"a.weight.quant_map": code, "a.weight.absmax": absmax}
    expected = (code[nibbles] * np.repeat(absmax, 64)[:300]).reshape(6, 50)

    def read(state, beside):
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        whole = {"a.weight": packed, "a.weight.quant_state.bitsandbytes__nf4": text} | beside
        return opened(whole, tmp_path / "f.safetensors")

    file = read(state, beside)
    assert list(file) == ["a.weight"] and file.precision == "bitsandbytes nf4"
    np.testing.assert_array_equal(file["a.weight"], expected)
    np.testing.assert_array_equal(file.part("a.weight", (slice(1, 4),)), expected[1:4])
    inner, block = rng.integers(0, 256, 5).astype(np.uint8), rng.uniform(1, 2, 3).astype(np.float32)
    nested = state | dict(nested_blocksize=2, nested_offset=1.5, nested_dtype="float32")
    names = {"a.weight.absmax": inner, "a.weight.nested_absmax": block, "a.weight.nested_quant_map": outer_code}
    found = read(nested, beside | names)["a.weight"]
    inner_values = outer_code[inner] * np.repeat(block, 2)[:5] + np.float32(1.5)
    np.testing.assert_allclose(found, (code[nibbles] * np.repeat(inner_values, 64)[:300]).reshape(6, 50), rtol=1e-6)
    for wrong in (dict(blocksize=0), dict(shape=[6, 51]), dict(shape="x"), dict(shape=[2**40, 2**40])):
        with pytest.raises(UserError, match="a.weight"):
            read(state | wrong, beside)
    with pytest.raises(UserError, match="absmax is missing"):
        read(state, {"a.weight.quant_map": code})
    q, scale = rng.integers(-127, 128, (4, 8)).astype(np.int8), rng.uniform(1, 2, 4).astype(np.float32)
    file = opened({"a.weight": q, "a.SCB": scale, "a.weight_format": np.uint8(0)}, tmp_path / "i.safetensors")
    np.testing.assert_allclose(file["a.weight"], q * scale[:, None] / 127, rtol=1e-6)


def test_quanto(tmp_path):
    rng = np.random.default_rng(0)
    scale = rng.uniform(1, 2, (4, 1)).astype(np.float32)
    for q in (rng.integers(-127, 128, (4, 8)).astype(np.int8), rng.normal(size=(4, 8)).astype(E4M3)):
        beside = {"a.weight._scale": scale, "a.input_scale": np.ones((), np.float32)}
        file = opened({"a.weight._data": q} | beside, tmp_path / "f.safetensors")
        assert list(file) == ["a.weight"] and len(file) == 1 and file.shape("a.weight") == (4, 8)
        np.testing.assert_allclose(file.part("a.weight", (slice(1, 3),)), (q.astype(np.float32) * scale)[1:3])


@pytest.mark.parametrize(
    ("tensors", "metadata", "kind"),
    [
        ({"a.weight": np.zeros((2, 2), E4M3), "a.weight_scale": np.ones((2, 2), np.float32)}, None, "scales .2, 2."),
        ({"a.weight_scale_2": np.float32(1)}, None, "nvfp4"),
        ({"a._weight_qdata": np.zeros(2, np.int8)}, None, "torchao"),
        ({"a.wscales": np.zeros(2, np.float32)}, None, "nunchaku"),
        ({"a.comfy_quant": np.frombuffer(b'{"format": "mxfp8"}', np.uint8)}, None, "mxfp8"),
        ({"a.comfy_quant": np.frombuffer(b'{"format"', np.uint8)}, None, "expected JSON"),
        ({"a": np.zeros(2, np.float32)}, dict(_quantization_metadata='{"layers": {"b": {"format": "int8_tensorwise"}}}'), "int8_tensorwise"),
        ({"a.weight": np.ones((2, 2), np.float32), "a.scale_weight": np.float32(2)}, None, "float32 with a scale"),
        ({"a.scale_weight": np.float32(2)}, None, "beside no a.weight"),
    ],
)  # fmt: skip
def test_other_quantisations_are_refused_by_name(tmp_path, tensors, metadata, kind):
    with pytest.raises(UserError, match=kind):
        opened(tensors, tmp_path / "f.safetensors", metadata)


def test_dummy_scales_beside_plain_weights_are_none(tmp_path):
    x = np.ones((2, 2), np.float32)
    assert list(opened({"a.weight": x, "a.scale_weight": np.float32(1)}, tmp_path / "f.safetensors")) == ["a.weight"]


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "_orig_mod.", "module.", "model."]
)
@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_every_prefix_and_naming_of_a_transformer(prefix, layout):
    tensors = {prefix + n: x for n, x in random_tensors(flux.table(HEAD, layout)).items()}
    (found,) = single(tensors, []).items()
    assert found[0] == "transformer" and found[1].config == HEAD
    found[1].convert(found[1].tensors, HEAD, lazily=True)


def test_a_whole_checkpoint(tmp_path, bfl, capsys):
    words = random_tensors(t5.table(T5Config.tiny(d_kv=8)))
    text = random_tensors(clip.text_table(CLIPTextConfig.tiny(hidden_size=64, num_attention_heads=1), clip.TEXT))
    whole = {f"model.diffusion_model.{n}": x for n, x in bfl.items()}
    whole |= {f"text_encoders.t5xxl.transformer.{n}": x for n, x in words.items()}
    whole |= {f"text_encoders.clip_l.transformer.{n}": x for n, x in text.items()}
    whole |= {
        "text_encoders.clip_l.logit_scale": np.ones((), np.float32),
        "text_encoders.clip_l.transformer.text_projection.weight": np.eye(2),
    }
    save_file(whole, tmp_path / "all.safetensors")
    (tmp_path / "words").mkdir()
    _tokenizers(tmp_path / "words")
    given = ("--source", tmp_path / "all.safetensors", "--out", tmp_path / "b")
    assert convert(*given, "--tokenizers", tmp_path / "words") == 0
    bundle = Bundle.open(tmp_path / "b", ("flux",))
    assert set(bundle.manifest["components"]) == {"transformer", "t5", "clip_text"} and bundle.part("tokenizers")
    assert convert(*given, "--overwrite", "--tokenizers", tmp_path) == 2
    assert "--tokenizers" in capsys.readouterr().err
    save_file(whole | {"stray.weight": np.zeros(2)}, tmp_path / "all.safetensors")
    assert convert(*given, "--overwrite") == 2
    assert "1 tensors belong to no component: stray.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("f.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", r"a git-LFS pointer of 6\d bytes"),
        ("f.safetensors", b"\n<!DOCTYPE html><html>", "a web page"),
        ("f.safetensors", b'{"error":"Unauthorized"}', "a message of a site .*Unauthorized"),
        ("f.safetensors", b"", "is empty"),
        ("f.gguf", b"GGUF" + b"\xff" * 40, "not a whole GGUF file"),
        ("f.safetensors", b"GGUF\x03", "not a whole GGUF file"),
        ("f-00001-of-00002.safetensors", b"x", "f-00002-of-00002.safetensors: missing; expected all 2 shards"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_weights(tmp_path, capsys, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert convert("--source", tmp_path / name, "--out", tmp_path / "b") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line) and not (tmp_path / "b").exists()


def test_the_end_of_a_download_that_is_zeros(tmp_path, bfl, capsys):
    save_file(bfl, tmp_path / "f.safetensors")
    data = (tmp_path / "f.safetensors").read_bytes()
    (tmp_path / "f.safetensors").write_bytes(data[:-100_000] + bytes(100_000))
    assert convert("--source", tmp_path / "f.safetensors", "--out", tmp_path / "b", "--dry-run") == 2
    assert "are zeros" in capsys.readouterr().err
    (tmp_path / "f.safetensors").write_bytes(data[:-50_000] + bytes(50_000))  # as a bias that was never trained
    assert convert("--source", tmp_path / "f.safetensors", "--out", tmp_path / "b", "--dry-run") == 0


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["transformer.x.lora_A.weight"], "a LoRA"), (["lora_unet_x.lora_down.weight", "lora_unet_x.alpha"], "a LoRA"),
        (["controlnet_blocks.0.weight", "x_embedder.weight"], "a ControlNet"), (["redux_up.weight"], "FLUX.1 Redux"),
        (["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"], "an XLabs IP-Adapter"),
        (["model.diffusion_model.label_emb.0.0.weight"], "an SDXL checkpoint"), (["encoder.layers.0.weight"], "TAEF1"),
        (["visual.class_embedding"], "a CLIP vision tower"), (["vision_model.head.probe"], "a SigLIP vision tower"),
        (["encoder.block.0.layer.1.DenseReluDense.wi.weight"], "T5 v1.0"),
    ],
)  # fmt: skip
def test_other_models_are_refused_by_name(tmp_path, capsys, names, said):
    save_file({name: np.ones((2, 2), np.float32) for name in names}, tmp_path / "f.safetensors")
    assert convert("--source", tmp_path / "f.safetensors", "--out", tmp_path / "b", "--dry-run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"this is {said}" in line


def test_other_numbers_of_blocks_and_rotary_axes_are_taken_or_refused(tmp_path, capsys):
    """A folder's config says which, and has to fit; a file without one has its blocks counted, and no axes but FLUX.1's."""
    part, axes = TransformerConfig(), [8, 4, 4]
    part.make(tmp_path)
    file = tmp_path / part.component / "config.json"
    given = json.loads(file.read_text())
    file.write_text(json.dumps(given | dict(axes_dims_rope=axes)))
    assert convert("--source", file.parent, "--out", tmp_path / "b") == 0
    config = Bundle.open(tmp_path / "b", ("flux",)).config("transformer", FluxConfig)
    assert list(config.axes_dim) == axes and config.depth == given["num_layers"]
    capsys.readouterr()
    for changes, said in (
        (
            dict(axes_dims_rope=[4, 6, 8]),
            "axes_dim (4, 6, 8): expected even numbers that add up to the head size 16",
        ),
        (dict(num_layers=given["num_layers"] + 1), "missing: transformer_blocks."),
        (dict(num_single_layers=0), "unexpected: single_transformer_blocks."),
    ):
        file.write_text(json.dumps(given | changes))
        assert convert("--source", file.parent, "--out", tmp_path / "c") == 2
        assert said in capsys.readouterr().err
    for depth, singles in ((3, 1), (2, 4)):
        other = dataclasses.replace(HEAD, depth=depth, depth_single_blocks=singles)
        shapes = engine.source_shapes(flux.table(other, "bfl"))
        assert flux.config_from_shapes(shapes, "bfl") == other
        with pytest.raises(UserError, match="without gaps"):
            flux.config_from_shapes(shapes | {"double_blocks.9.a": ()}, "bfl")
    wide = engine.source_shapes(flux.table(dataclasses.replace(HEAD, hidden_size=96, axes_dim=(16, 40, 40)), "bfl"))
    with pytest.raises(UserError, match="split into rotary axes.*convert it from a diffusers folder"):
        flux.config_from_shapes(wide, "bfl")


def test_siglip_goes_beside_clip(tmp_path, capsys):
    """Alone it is said what it is for."""
    config = SiglipVisionConfig.tiny(hidden_size=72, num_attention_heads=1)
    save_file(random_tensors(siglip.table(config, clip.VISION)), tmp_path / "siglip.safetensors")
    vision = CLIPVisionConfig.tiny(hidden_size=64, num_attention_heads=1)
    save_file(random_tensors(clip.vision_table(vision, clip.VISION)), tmp_path / "clip.safetensors")
    save_file(random_tensors(vae.table(VAEConfig.tiny(), "bfl")), tmp_path / "ae.safetensors")
    words = ("--source", tmp_path / "ae.safetensors", "--clip-vision", tmp_path / "siglip.safetensors")
    assert convert(*words, "--out", tmp_path / "b", "--dry-run") == 0
    assert "SigLIP is what InstantX's adapter reads" in capsys.readouterr().err
    assert convert(*words, "--clip-vision", tmp_path / "clip.safetensors", "--out", tmp_path / "b") == 0
    assert "InstantX" not in capsys.readouterr().err
    assert {"clip_vision", "siglip"} < json.loads((tmp_path / "b" / "bundle.json").read_text())["components"].keys()


def test_sizes_are_read_off_shapes():
    config = T5Config.tiny(d_kv=8, num_layers=3)
    shapes = {n: x.shape for n, x in random_tensors(t5.table(config)).items()}
    assert t5.config_from_shapes(shapes) == config
    text = CLIPTextConfig.tiny(hidden_size=128, num_attention_heads=2)
    for prefix in ("", clip.TEXT):
        assert (
            clip_files.text_config({n: x.shape for n, x in random_tensors(clip.text_table(text, prefix)).items()})
            == text
        )
    vision = CLIPVisionConfig.tiny(hidden_size=128, num_attention_heads=2)
    shapes = {n: x.shape for n, x in random_tensors(clip.vision_table(vision, clip.VISION)).items()}
    assert clip_files.vision_config(shapes) == vision
    diffusers = {n: x.shape for n, x in random_tensors(flux.table(HEAD, "diffusers")).items()}
    assert flux.config_from_shapes(diffusers, "diffusers") == HEAD


def test_the_transformer_decides_the_schedule(capsys, bfl):
    def schedule(guided, scheduler):
        sources = Sources(
            single(bfl if guided else {n: x for n, x in bfl.items() if "guidance" not in n}, []), {}, scheduler
        )
        return LAYOUT.manifest(sources, None)["schedule"]

    dev = dict(use_dynamic_shifting=True, shift=3.0, base_shift=0.4)
    schnell = dict(use_dynamic_shifting=False, shift=1.0)
    assert schedule(True, dev)["base_shift"] == 0.4 and not schedule(False, schnell)["dynamic"]
    assert capsys.readouterr().err == ""
    assert schedule(True, schnell)["dynamic"] and not schedule(False, dev)["dynamic"]
    assert schedule(False, dev)["shift"] == 1.0
    assert capsys.readouterr().err.count("the folder's scheduler is not of its kind") == 3


def test_folders_of_every_kind(source, tmp_path, capsys):  # noqa: F811
    def parts(path):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        status = convert("--source", path, "--out", tmp_path / "b", "--dry-run")
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]] if status == 0 else None

    every = ["transformer", "vae", "t5", "clip_text"]
    cache = tmp_path / "models--x--y"
    shutil.copytree(source, cache / "snapshots" / "abc")
    assert parts(source) == parts(cache) == parts(cache / "snapshots" / "abc") == every
    shutil.copytree(source, cache / "snapshots" / "def")
    assert parts(cache) is None
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc\n")
    assert parts(cache) == every
    for name, place in (
        ("transformer", "transformer"),
        ("vae", "vae"),
        ("t5", "text_encoder_2"),
        ("clip_text", "text_encoder"),
    ):
        assert parts(source / place) == [name]
    shutil.rmtree(cache / "snapshots" / "abc" / "text_encoder_2")
    shutil.rmtree(cache / "snapshots" / "abc" / "tokenizer_2")
    assert parts(cache) == ["transformer", "vae", "clip_text"]
    index = cache / "snapshots" / "def" / "model_index.json"
    index.write_text(json.dumps(dict(_class_name="FluxKontextPipeline")))
    assert parts(index.parent) == every
    weights = index.parent / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert parts(index.parent) is None
    weights.unlink()
    assert parts(index.parent) == every


def test_a_model_on_the_hub(source, monkeypatch, capsys, tmp_path):  # noqa: F811
    import huggingface_hub
    from huggingface_hub import errors

    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda repo, file, revision: asked.append((repo, file, revision)) or source / file,
    )
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, revision, allow_patterns: asked.append((repo, revision, allow_patterns)) or source,
    )
    assert convert("--source", "hf://owner/name@v1", "--out", tmp_path / "b", "--dry-run") == 0
    assert asked[0] == ("owner/name", "model_index.json", "v1") and asked[1][:2] == ("owner/name", "v1")
    assert "*.safetensors" not in asked[1][2] and "*/*.safetensors" in asked[1][2]
    assert hub.local(hub.Path("hf://owner/name/sub/x.gguf"), "source") == source / "sub" / "x.gguf"

    def fails(error):
        def download(*args, **options):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        assert convert("--source", "hf://owner/name", "--out", tmp_path / "b") == 2
        return capsys.readouterr().err

    assert "cannot be downloaded (no network)" in fails(OSError("no network"))
    response = type("Response", (), dict(headers={}, request=None, status_code=403))()
    gated = errors.GatedRepoError.__new__(errors.GatedRepoError)
    gated.args, gated.response = ("gated",), response
    assert "is gated" in fails(gated)
    assert convert("--source", "hf://owner", "--out", tmp_path / "b") == 2
    assert "expected hf://owner/name" in capsys.readouterr().err


def test_torch_is_asked_for_by_name(tmp_path, monkeypatch, capsys):
    import sys

    (tmp_path / "f.pt").write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert convert("--source", tmp_path / "f.pt", "--out", tmp_path / "b") == 2
    assert "pip install torch" in capsys.readouterr().err


def test_quantised_weights_are_bfloat16_unless_asked_otherwise(tmp_path, bfl):
    q = {n: x.astype(E4M3) for n, x in bfl.items()}
    save_file(q, tmp_path / "f.safetensors")
    assert convert("--source", tmp_path / "f.safetensors", "--out", tmp_path / "b") == 0
    entry = Bundle.open(tmp_path / "b", ("flux",)).manifest["components"]["transformer"]
    assert entry["dtype"] == "bfloat16" and quantised.KEPT == ml_dtypes.bfloat16


def test_gguf_tensors_of_nothing_and_rows_of_others(tmp_path):
    import gguf

    rows = np.arange(256, dtype=np.float32).reshape(4, 64)
    writer = gguf.GGUFWriter(path=tmp_path / "w.gguf", arch="flux")
    writer.add_tensor("none", np.zeros((3, 0), np.float32))
    writer.add_tensor("none of q", np.zeros((3, 0), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor(
        "q", gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    file = GGUFFile(tmp_path / "w.gguf")
    assert file["none"].shape == (3, 0) and file.part("none", (slice(1, 3),)).shape == (2, 0)
    assert file["none of q"].shape == (3, 0) and file["none of q"].dtype == np.float32
    np.testing.assert_allclose(file.part("q", (slice(1, 3),)), rows[1:3], rtol=0.02)


def test_a_gguf_list_is_no_longer_than_the_file(tmp_path):
    entry = struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 2**62)  # a list of so many numbers
    (tmp_path / "w.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + entry + bytes(64))
    with pytest.raises(UserError, match="not a whole GGUF file .it is cut off"):
        GGUFFile(tmp_path / "w.gguf")
