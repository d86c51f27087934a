"""`python -m train.prepare`: what it writes, says and refuses."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynaip_jax.commandline import run_cli
from dynaip_jax.data import records as store
from dynaip_jax.data.check import png
from dynaip_jax.data.records import open_dataset
from dynaip_jax.data.sources import SCORES
from tests.data.photos import CAPTIONS, entries, photo, write_lines
from train import prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture
def manifest(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    return write_lines(folder, entries(folder))


def run(*args):
    """Exit status of the command."""
    return run_cli(prepare.main, [str(a) for a in args])


def left_behind(folder):
    """What lies in `folder` beside the photographs."""
    return sorted(p.name for p in folder.iterdir() if p.name != "photos")


def test_as_a_program(manifest, tmp_path):
    command = [sys.executable, "-m", "train.prepare", "--source", manifest, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'out'}: 4 rows from 4 entries of {manifest}\n"
    dataset = open_dataset(tmp_path / "out")
    assert [dataset[n].caption for n in range(4)] == [c for c, _ in CAPTIONS.values()]
    assert dataset[0].target == photo("astronaut")
    assert left_behind(tmp_path) == ["out"]


def test_other_layouts(manifest, tmp_path):
    folder = manifest.parent
    for name in (*CAPTIONS, "mask"):
        (folder / f"{name}.txt").write_text(f"a picture called {name}")
    assert run("--source", folder, "--format", "folder", "--out", tmp_path / "a") == 0
    assert [open_dataset(tmp_path / "a")[n].caption.split()[-1] for n in range(5)] == sorted((*CAPTIONS, "mask"))

    pair = np.concatenate([np.asarray(Image.open(folder / "astronaut.png"))] * 2, axis=1)
    (folder / "pair.png").write_bytes(png(pair))
    description = dict(item="astronaut", description_0="left astronaut", description_1="right astronaut")
    line = dict(image="pair.png", description=description, quality_assessment=dict.fromkeys(SCORES, 3))
    write_lines(folder, [line, line])
    assert run("--source", folder, "--format", "subjects200k", "--out", tmp_path / "b") == 0
    assert [open_dataset(tmp_path / "b")[n].number for n in range(4)] == [1, 1, 2, 2]
    assert run("--source", folder, "--format", "subjects200k", "--min-quality", 4, "--out", tmp_path / "c") == 2


def break_two(manifest):
    lines = manifest.read_text().splitlines()
    write_lines(manifest.parent, [lines[0], "{broken", lines[1].replace("chelsea.png", "gone.png"), lines[2], lines[3]])


def test_every_bad_row_is_told_and_nothing_written(manifest, tmp_path, capsys):
    break_two(manifest)
    assert run("--source", manifest, "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert told[0].startswith("row 2: broken JSON") and told[1].startswith("row 3: ") and "gone.png" in told[1]
    assert told[2] == "error: 2 bad rows, named above; nothing was written; correct them, or pass --skip-bad"
    assert left_behind(tmp_path) == []


def test_nothing_is_written_after_a_bad_row(manifest, tmp_path, monkeypatch):
    break_two(manifest)
    written = []
    monkeypatch.setattr(prepare, "write_dataset", lambda folder, records: written.extend(r.number for r in records))
    assert run("--source", manifest, "--out", tmp_path / "out") == 2
    assert written == [1]


def test_bad_rows_can_be_left_out(manifest, tmp_path, capsys):
    break_two(manifest)
    assert run("--source", manifest, "--out", tmp_path / "out", "--skip-bad") == 0
    said = capsys.readouterr()
    assert [line[:6] for line in said.err.splitlines()] == ["row 2:", "row 3:"]
    assert "3 rows from 5 entries" in said.out and "2 bad rows left out" in said.out
    assert open_dataset(tmp_path / "out").numbers.tolist() == [1, 4, 5]


def test_limits_reach_the_check(manifest, tmp_path, capsys):
    assert run("--source", manifest, "--out", tmp_path / "out", "--min-side", 301, "--max-pixels", 270_000) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line[:6] for line in told[:-1]] == ["row 2:", "row 3:", "row 4:"]
    assert "tiny" in told[0] and "at most 270000" in told[1] and "at most 270000" in told[2]


def test_large_pictures_are_shrunk(manifest, tmp_path):
    assert run("--source", manifest, "--out", tmp_path / "out", "--shrink", 100) == 0
    assert open_dataset(tmp_path / "out").sizes.min(axis=1).tolist() == [100] * 4


def test_rows_come_in_order_from_many_threads(manifest, tmp_path, monkeypatch):
    lines = manifest.read_text().splitlines()
    write_lines(manifest.parent, lines * 8)
    threads, check = set(), prepare.check
    monkeypatch.setattr(prepare, "check", lambda *a: (threads.add(threading.get_ident()), check(*a))[1])
    assert run("--source", manifest, "--out", tmp_path / "out", "--jobs", 3) == 0
    assert open_dataset(tmp_path / "out").numbers.tolist() == list(range(1, 33))
    assert 1 < len(threads) <= 3


def test_an_existing_dataset_is_kept_or_replaced(manifest, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--source", manifest, "--out", out) == 0
    lines = manifest.read_text().splitlines()
    write_lines(manifest.parent, lines[:2])
    assert run("--source", manifest, "--out", out) == 2
    assert "already exists" in capsys.readouterr().err and len(open_dataset(out)) == 4
    write_lines(manifest.parent, [*lines[:2], "{"])
    assert run("--source", manifest, "--out", out, "--overwrite") == 2
    assert len(open_dataset(out)) == 4
    write_lines(manifest.parent, lines[:2])
    assert run("--source", manifest, "--out", out, "--overwrite") == 0
    assert len(open_dataset(out)) == 2
    assert left_behind(tmp_path) == ["out"]


def test_a_folder_of_something_else_is_never_replaced(manifest, tmp_path, capsys):
    assert run("--source", manifest, "--out", manifest.parent, "--overwrite") == 2
    assert "holds something else" in capsys.readouterr().err and manifest.is_file()


@pytest.mark.parametrize("limit", [100, 400_000])  # reached by tfds' own files, and by the shard
def test_a_disk_that_fills_up_leaves_nothing(manifest, tmp_path, limit):
    """A limit on the size of files stands for the disk: the write fails in the same place, with another reason."""
    code = (
        "import resource, runpy\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "runpy.run_module('train.prepare', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, "--source", manifest, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith(f"error: --out {tmp_path / 'out'}: writing failed (")
    assert "File too large" in done.stderr and "nothing was changed" in done.stderr and done.stderr.count("\n") == 1
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (["--source", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--source", "missing", "--format", "folder"], "missing: no such folder"),
        (["--source", "photos", "--format", "parquet"], "invalid choice: 'parquet'"),
        (["--source", "photos", "--jobs", "0"], "--jobs 0"),
        (["--source", "photos", "--min-side", "2"], "--min-side 2"),
        (["--source", "photos", "--shrink", "20"], "--shrink 20"),
        (["--source", "photos", "--shrink", "512", "--format", "subjects200k"], "--shrink 512: expected another"),
        (["--source", "photos", "--min-quality", "3"], "--min-quality 3 with --format manifest"),
        (["--source", "photos", "--min-quality", "6", "--format", "subjects200k"], "--min-quality 6"),
        ([], "--source"),
    ],
)
def test_bad_options(manifest, tmp_path, monkeypatch, capsys, args, found):
    monkeypatch.chdir(tmp_path)
    assert run(*args, "--out", "out") == 2
    told = capsys.readouterr().err
    assert found in told and told.count("\n") == 1
    assert left_behind(tmp_path) == []


def test_empty_source(manifest, tmp_path, capsys):
    manifest.write_text("\n")
    assert run("--source", manifest, "--out", tmp_path / "out") == 2
    assert "metadata.jsonl: empty" in capsys.readouterr().err
    manifest.write_text("{}\n")
    assert run("--source", manifest, "--out", tmp_path / "out", "--skip-bad") == 2
    assert "no rows are left" in capsys.readouterr().err.splitlines()[-1]
    assert left_behind(tmp_path) == []


def test_what_is_written_says_what_it_is(manifest, tmp_path):
    run("--source", manifest, "--out", tmp_path / "out")
    info = json.loads((tmp_path / "out" / store.INFO).read_text())
    assert info["fileFormat"] == "array_record" and info["splits"][0]["shardLengths"] == ["4"]
