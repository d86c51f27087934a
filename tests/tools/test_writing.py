"""How the converter writes: little in memory, gone on with after a kill, whole or not at all, compared again with its sources."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dynaip_jax.commandline import run_cli
from dynaip_jax.families.registry import FAMILIES
from dynaip_jax.models.flux import FluxConfig
from dynaip_jax.storage import bundle as bundles
from dynaip_jax.storage import checksums, pieces
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.storage.manifest import fingerprint
from tests.tools.test_convert import COMPONENTS, HEAD, random_tensors
from tools.convert_torch_weights import flux
from tools.convert_torch_weights.__main__ import main

DEEP = FluxConfig(
    in_channels=64, out_channels=64, vec_in_dim=24, context_in_dim=20, hidden_size=256, num_heads=2, depth=1, depth_single_blocks=10
)  # fmt: skip
KILLED = """
import os, sys
from dynaip_jax.storage import pieces
from tools.convert_torch_weights.__main__ import main
write, count = pieces.Journal.write, iter(range(10**6))
def killed(self, path, name, content):
    if next(count) == int(sys.argv[1]):
        (self.partial / "half").write_bytes(b"x")
        os.kill(os.getpid(), 9)
    return write(self, path, name, content)
pieces.Journal.write = killed
main(sys.argv[2:])
"""


def convert(*words):
    return run_cli(main, [str(w) for w in words])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A transformer of random numbers in bfloat16, BFL's layout."""
    import ml_dtypes

    path = tmp_path_factory.mktemp("source") / "f.safetensors"
    save_file(random_tensors(flux.table(HEAD, "bfl"), ml_dtypes.bfloat16), path)
    return path


@pytest.fixture
def reads(monkeypatch):
    """How many pieces were read of a source and written."""
    count, write = [], pieces.Journal.write
    monkeypatch.setattr(pieces.Journal, "write", lambda *args: (count.append(args[2]), write(*args))[1])
    return count


def test_what_is_written_piece_by_piece_is_what_orbax_reads(source, tmp_path):
    assert convert("--source", source, "--out", tmp_path / "b") == 0
    opened = Bundle.open(tmp_path / "b", FAMILIES)
    stored = opened.load("transformer", COMPONENTS["transformer"].abstract(HEAD))
    whole = flux.params_from_torch(load_file(source), HEAD)
    jax.tree.map(np.testing.assert_array_equal, stored, whole)
    assert opened.fingerprint == fingerprint(whole)
    made = {name: value for name, value in checksums.of_files(tmp_path / "b").items() if name != "bundle.json"}
    assert opened.manifest["checksums"] == made
    (origin,) = opened.manifest["components"]["transformer"]["provenance"]
    assert origin == dict(file="f.safetensors", sha256=pieces.Hashes().ask(source).result())


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "ROOM", 1 << 20)
    monkeypatch.setattr(pieces, "AT_ONCE", 2)
    save_file(random_tensors(flux.table(DEEP, "bfl")), tmp_path / "deep.safetensors")
    size, largest = (tmp_path / "deep.safetensors").stat().st_size, 256 * 7 * 256 * 4
    convert("--source", tmp_path / "deep.safetensors", "--out", tmp_path / "b", "--dry-run")  # what is loaded once
    tracemalloc.start()
    assert convert("--source", tmp_path / "deep.safetensors", "--out", tmp_path / "b") == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 24 * largest and peak < 6 * largest + pieces.CHUNK, (size, peak, largest)


def test_a_killed_writer_is_gone_on_with(source, tmp_path, reads):
    words = ("--source", str(source), "--out", str(tmp_path / "out" / "b"))
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "60", *words],
        cwd=root,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = (tmp_path / "out").glob(".b.dynaip-*.part")
    first = sorted((left / "transformer").rglob("*.0*"))
    damaged = next(p for p in first if p.is_file() and p.stat().st_size > 1000)
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"xyz")  # as a loss of power may leave it
    assert convert(*words) == 0
    assert convert("--source", source, "--out", tmp_path / "other") == 0
    values = [n for n in reads if not n.endswith(("zarray", "METADATA"))]
    again = len(values) - len({*values})  # written by both
    name = damaged.relative_to(left).as_posix()
    assert 0 < again < len({*values}) and values.count(name) == 2
    mine, other = (json.loads((p / "bundle.json").read_text()) for p in (tmp_path / "out" / "b", tmp_path / "other"))
    assert mine == other
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b"]
    assert not [p.name for p in (tmp_path / "out" / "b").iterdir() if p.name.startswith(".")]


def test_what_was_killed_over_another_source_is_not_gone_on_with(source, tmp_path, reads):
    import ml_dtypes

    left = tmp_path / f".b.dynaip-{'0' * 8}.part"
    (left / "transformer").mkdir(parents=True)
    assert convert("--source", source, "--out", tmp_path / "b") == 0
    assert not left.exists()
    other = tmp_path / "f.safetensors"
    save_file(random_tensors(flux.table(HEAD, "bfl"), ml_dtypes.bfloat16), other)
    keys = []
    from tools.convert_torch_weights import __main__ as converter

    real = converter.key
    for path, words in ((source, ()), (source, ("--dtype", "float32")), (other, ())):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(converter, "key", lambda planned: keys.append(real(planned)) or keys[-1])
            assert convert("--source", path, "--out", tmp_path / "b", "--overwrite", *words) == 0
    assert len({*keys}) == 3


def test_a_folder_that_comes_meanwhile_stays(source, tmp_path, monkeypatch, capsys):
    out, write = tmp_path / "b", bundles.write_leaves

    def comes(*args):
        out.mkdir()
        (out / "bundle.json").write_text("mine")
        return write(*args)

    monkeypatch.setattr(bundles, "write_leaves", comes)
    assert convert("--source", source, "--out", out) == 2
    assert [p.name for p in out.iterdir()] == ["bundle.json"] and (out / "bundle.json").read_text() == "mine"
    assert "something else came there" in capsys.readouterr().err and (tmp_path / "b-1" / "transformer").is_dir()


def test_a_full_disk_is_one_line_and_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    count, replace = iter(range(1000)), os.replace

    def full(*args):
        if next(count) > 60:
            raise OSError(28, "No space left on device")
        replace(*args)

    monkeypatch.setattr(pieces.os, "replace", full)
    assert convert("--source", source, "--out", tmp_path / "b") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "transformer: converting" and len(lines) == 2
    assert "writing failed (No space left on device); nothing was changed; free space" in lines[1]
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_compared_with_its_sources(source, tmp_path, capsys):
    out = tmp_path / "b"
    assert convert("--source", source, "--out", out) == 0
    assert convert("--source", source, "--out", out, "--verify") == 0
    assert "transformer: all 55 arrays are as in the source" in capsys.readouterr().out
    assert convert("--source", source, "--out", out, "--verify", "--dtype", "float32") == 2
    assert "is not as in the source" in capsys.readouterr().err
    tensors = load_file(source)
    tensors["single_blocks.1.linear2.bias"] = tensors["single_blocks.1.linear2.bias"] + 1
    save_file(tensors, tmp_path / "other.safetensors")
    assert convert("--source", tmp_path / "other.safetensors", "--out", out, "--verify") == 2
    assert "single_blocks.mlp_out.bias is not as in the source" in capsys.readouterr().err
    file = out / "transformer" / "img_in.kernel" / "0.0"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert convert("--source", source, "--out", out, "--verify") == 2
    assert "damaged or changed" in capsys.readouterr().err


def test_the_table_of_a_dry_run_reads_headers_alone(source, tmp_path, capsys, monkeypatch):
    from dynaip_jax.storage.tensors import TensorFile

    monkeypatch.setattr(TensorFile, "_read", lambda *args: pytest.fail("a tensor was read"))
    assert convert("--source", source, "--out", tmp_path / "b", "--dry-run", "--dtype", "float32") == 0
    head, row, told = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "component" and told.startswith("all names and shapes fit")
    assert [w for w in row.split() if w != ""][:7] == [
        "transformer",
        "60",
        "1,259,840",
        "0.002",
        "bfloat16",
        "0.005",
        "float32",
    ]
