"""LoRAs that the converter merges: what a model that is loaded with them has, bit for bit, in little memory, and said in the bundle."""

import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dynaip_jax.adapters.lora import Scaled, merge
from dynaip_jax.families.flux_names import public_names
from dynaip_jax.families.registry import FAMILIES
from dynaip_jax.models.clip import CLIPTextConfig
from dynaip_jax.models.t5 import T5Config
from dynaip_jax.sampling.loras import _read
from dynaip_jax.storage import pieces
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.storage.folders import sha256_of
from tests.tools.test_convert import COMPONENTS, HEAD, convert, random_tensors
from tests.tools.test_writing import DEEP, source  # noqa: F401  (a fixture)
from tools.convert_torch_weights import flux

BFL = "diffusion_model."


def factors(rng, name, out, in_, alpha=None):
    down, up = rng.normal(size=(2, in_)), rng.normal(size=(out, 2))
    made = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return made | ({} if alpha is None else {f"{name}.alpha": np.float32(alpha)})


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Two files: of matrices that lie in two leaves, one with a norm over all of it, of part of one, and a bias; and of one block."""
    folder, rng, w = tmp_path_factory.mktemp("loras"), np.random.default_rng(0), HEAD.hidden_size
    first = factors(rng, f"{BFL}single_blocks.1.linear1", 7 * w, w, 0.5) | factors(rng, f"{BFL}txt_in", w, 20)
    first[f"{BFL}single_blocks.1.linear1.dora_scale"] = rng.uniform(0.5, 2, size=(1, w))
    first |= factors(rng, "transformer.transformer_blocks.0.attn.to_k", w, w)
    first |= factors(rng, "transformer.norm_out.linear", 2 * w, w)
    first[f"{BFL}double_blocks.0.img_mlp.0.diff_b"] = rng.normal(size=4 * w)
    second = factors(rng, f"{BFL}single_blocks.1.linear1", 7 * w, w) | factors(
        rng, f"{BFL}single_blocks.0.linear2", w, 5 * w
    )
    for name, tensors in (("a.safetensors", first), ("b.safetensors", second)):
        save_file({n: np.asarray(x, np.float32) for n, x in tensors.items()}, folder / name)
    return folder / "a.safetensors", folder / "b.safetensors"


def test_a_bundle_holds_what_loading_with_them_gives(source, loras, tmp_path):  # noqa: F811
    plain, out = tmp_path / "plain", tmp_path / "b"
    words = ("--source", source, "--lora", f"{loras[0]}=0.7", "--lora", loras[1])
    assert convert("--source", source, "--out", plain) == 0
    assert convert(*words, "--out", out) == 0
    target = jax.tree.map(lambda x: x.update(dtype=ml_dtypes.bfloat16), COMPONENTS["transformer"].abstract(HEAD))
    base, made = (Bundle.open(path, FAMILIES) for path in (plain, out))
    names = public_names(HEAD, CLIPTextConfig.tiny(), T5Config.tiny())
    changes = [
        Scaled(c, s) for path, s in zip(loras, (0.7, 1.0), strict=True) for c in _read(str(path), s, names).changes
    ]
    expected = merge(base.load("transformer", target), names.components["transformer"], changes)
    stored = made.load("transformer", target)
    jax.tree.map(np.testing.assert_array_equal, stored, expected)
    changed = jax.tree.map(lambda x, y: not np.array_equal(x, y), stored, base.load("transformer", target))
    assert sum(jax.tree.leaves(changed)) == 8
    assert made.fingerprint != base.fingerprint
    file, *merged = made.manifest["components"]["transformer"]["provenance"]
    assert file["file"] == "f.safetensors"
    assert merged == [
        dict(lora=path.name, scale=s, sha256=sha256_of(path)) for path, s in zip(loras, (0.7, 1.0), strict=True)
    ]


def test_it_is_part_of_what_is_compared_and_gone_on_with(source, loras, tmp_path, capsys):  # noqa: F811
    from tools.convert_torch_weights import __main__ as converter

    out, keys, real = tmp_path / "b", [], converter.key
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter, "key", lambda planned: keys.append(real(planned)) or keys[-1])
        for given in ((), ("--lora", f"{loras[0]}=0.5"), ("--lora", loras[0])):
            assert convert("--source", source, *given, "--out", out, "--overwrite") == 0
    assert len({*keys}) == 3
    assert convert("--source", source, "--lora", loras[0], "--out", out, "--verify") == 0
    assert convert("--source", source, "--out", out, "--verify") == 2
    assert "is not as in the source" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "ROOM", 1 << 20)
    monkeypatch.setattr(pieces, "AT_ONCE", 2)
    save_file(random_tensors(flux.table(DEEP, "bfl")), tmp_path / "deep.safetensors")
    rng, w, tensors = np.random.default_rng(0), DEEP.hidden_size, {}
    for n in range(DEEP.depth_single_blocks):
        tensors |= factors(rng, f"{BFL}single_blocks.{n}.linear1", 7 * w, w)
    save_file({n: x.astype(np.float32) for n, x in tensors.items()}, tmp_path / "a.safetensors")
    words = ("--source", tmp_path / "deep.safetensors", "--lora", tmp_path / "a.safetensors", "--out", tmp_path / "b")
    size, largest = (tmp_path / "deep.safetensors").stat().st_size, 7 * w * w * 4
    convert(*words, "--dry-run")  # what is loaded once
    tracemalloc.start()
    assert convert(*words) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 24 * largest and peak < 10 * largest + pieces.CHUNK, (size, peak, largest)


def test_what_does_not_fit_is_one_line(source, loras, tmp_path, capsys):  # noqa: F811
    def refused(*words):
        assert convert("--source", source, *words, "--out", tmp_path / "b") == 2
        return capsys.readouterr().err.splitlines()[-1]

    te = factors(np.random.default_rng(0), "lora_te3_encoder_block_0_layer_0_SelfAttention_q", 4096, 4096)
    te = {n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): x.astype(np.float32) for n, x in te.items()}
    save_file(te, tmp_path / "te.safetensors")
    assert "changes t5, which no --source has" in refused("--lora", tmp_path / "te.safetensors")
    assert "no such file; expected a LoRA" in refused("--lora", tmp_path / "none.safetensors")
    assert "expected a number of at most 1000" in refused("--lora", f"{loras[0]}=1e9")
    assert "--lora: not merged with --to bfl" in refused("--lora", loras[0], "--to", "bfl")
    control = {
        "img_in.lora_A.weight": np.zeros((2, 128), np.float32),
        "img_in.lora_B.weight": np.zeros((128, 2), np.float32),
    }
    save_file(control, tmp_path / "control.safetensors")
    assert "a control LoRA, which reads a control picture" in refused("--lora", tmp_path / "control.safetensors")
    assert not (tmp_path / "b").exists()
