"""Bundles as public files again: every bit is as it was."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dynaip_jax.models.clip import CLIPTextConfig
from dynaip_jax.models.t5 import T5Config
from dynaip_jax.models.vae import VAEConfig
from dynaip_jax.testing import _tokenizers
from tests.tools.test_convert import HEAD, convert, random_tensors
from tools.convert_torch_weights import clip, flux, t5, vae
from tools.convert_torch_weights.engine import source_shapes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A transformer in bfloat16 and an autoencoder in float32, BFL's layout, and text encoders; and the bundle of all."""
    folder = tmp_path_factory.mktemp("files")
    tables = dict(
        flux1=(flux.table(HEAD, "bfl"), ml_dtypes.bfloat16),
        ae=(vae.table(VAEConfig.tiny(), "bfl"), np.float32),
        t5=(t5.table(T5Config.tiny(d_kv=8)), np.float16),
        clip=(clip.text_table(CLIPTextConfig.tiny(hidden_size=64, num_attention_heads=1), clip.TEXT), np.float32),
    )
    for name, (table, dtype) in tables.items():
        save_file(random_tensors(table, dtype), folder / f"{name}.safetensors")
    (folder / "words").mkdir()
    _tokenizers(folder / "words")
    words = [word for name in tables for word in ("--source", folder / f"{name}.safetensors")]
    assert convert(*words, "--tokenizers", folder / "words", "--out", folder / "bundle") == 0
    return folder


def same(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert x.dtype == other[name].dtype and x.tobytes() == other[name].tobytes(), name


def test_bfl(files, tmp_path):
    assert convert("--source", files / "bundle", "--to", "bfl", "--out", tmp_path / "out") == 0
    for name in ("flux1", "ae"):
        same(load_file(tmp_path / "out" / f"{name}.safetensors"), load_file(files / f"{name}.safetensors"))
    assert convert("--source", tmp_path / "out" / "flux1.safetensors", "--out", tmp_path / "again") == 0
    first, again = (json.loads((p / "bundle.json").read_text()) for p in (files / "bundle", tmp_path / "again"))
    assert first["fingerprint"] == again["fingerprint"]


def test_diffusers_and_back(files, tmp_path):
    assert convert("--source", files / "bundle", "--to", "diffusers", "--out", tmp_path / "out") == 0
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {n: x.shape for n, x in stored.items()} == source_shapes(flux.table(HEAD, "diffusers"))
    for name, place in (("t5", "text_encoder_2"), ("clip", "text_encoder")):
        same(load_file(tmp_path / "out" / place / "model.safetensors"), load_file(files / f"{name}.safetensors"))
    config = tmp_path / "out" / "transformer" / "config.json"
    assert json.loads(config.read_text())["axes_dims_rope"] == [16, 56, 56]
    assert convert("--source", tmp_path / "out", "--out", tmp_path / "again") == 0
    first, again = (json.loads((p / "bundle.json").read_text()) for p in (files / "bundle", tmp_path / "again"))
    for name in ("fingerprint", "schedule", "text", "defaults"):
        assert first[name] == again[name]
    weights = lambda content: {n: v for n, v in content["checksums"].items() if not n.startswith("tokenizers")}
    assert weights(first) == weights(again)


def test_an_orbax_bundle_of_before(tiny, tmp_path):
    assert convert("--source", tiny[0], "--to", "bfl", "--out", tmp_path / "out") == 0
    assert load_file(tmp_path / "out" / "flux1.safetensors")["img_in.weight"].dtype == np.float32


def test_what_cannot_go_back(files, tmp_path, capsys):
    for words, message in (
        (("--source", files / "bundle", "--source", files / "bundle", "--to", "bfl"), "2 sources; expected one bundle"),
        (("--source", files / "ae.safetensors", "--to", "diffusers"), "expected one bundle's folder"),
        (("--source", files, "--to", "diffusers"), "no bundle.json"),
        (("--source", files / "bundle", "--to", "bfl", "--dtype", "float32"), "--dtype: changes nothing with --to bfl"),
        (("--source", files / "bundle", "--to", "bfl", "--dry-run"), "--dry-run: changes nothing with --to bfl"),
        (("--clip-vision", files, "--to", "bfl"), "--clip-vision: changes nothing with --to bfl"),
    ):
        assert convert(*words, "--out", tmp_path / "out") == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("mine")
    assert convert("--source", files / "bundle", "--to", "bfl", "--out", tmp_path / "kept", "--overwrite") == 2
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["thesis.txt"]
