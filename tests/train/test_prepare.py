"""`python -m train.prepare`: what it writes, says and refuses."""

import json
import multiprocessing
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynaip_jax.commandline import run_cli
from dynaip_jax.data import records as store
from dynaip_jax.data.check import Limits, png
from dynaip_jax.data.joining import join
from dynaip_jax.data.records import open_dataset
from dynaip_jax.data.sources import SCORES, read_manifest
from dynaip_jax.errors import UserError
from dynaip_jax.storage.locks import hold
from tests.data.photos import CAPTIONS, entries, photo, write_lines
from train import parts, prepare

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


@pytest.fixture
def parts_of_two(monkeypatch):
    """Parts of two rows, made in this process, where the test can look on."""
    monkeypatch.setattr(parts, "ROWS_A_SHARD", 2)
    made, make = [], parts.make_part

    class Here:
        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, rows, folder, limits):
            done = Future()
            if not (folder / "part.json").is_file():
                made.append(folder.name)
            done.set_result(make(rows, folder, limits))
            return done

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(parts, "ProcessPoolExecutor", Here)
    return made


def same_datasets(a, b):
    a, b = open_dataset(a), open_dataset(b)
    assert a.content == b.content and a.numbers.tolist() == b.numbers.tolist() and a.sizes.tolist() == b.sizes.tolist()
    assert all(np.array_equal(x, y) for n in range(len(a)) for x, y in zip(a[n], b[n], strict=True))


def test_processes_make_what_threads_make(manifest, tmp_path):
    """Real ones, which write shards of their own."""
    lines = manifest.read_text().splitlines()
    write_lines(manifest.parent, lines * 3)
    assert run("--source", manifest, "--out", tmp_path / "a") == 0
    assert run("--source", manifest, "--out", tmp_path / "b", "--processes", 2) == 0
    same_datasets(tmp_path / "a", tmp_path / "b")
    assert left_behind(tmp_path) == ["a", "b"]


def test_no_process_outlives_a_failure(manifest, tmp_path, capsys, monkeypatch):
    """Here one part of four cannot be made; the others wait for the only process, which is in the next one by then."""
    monkeypatch.setattr(parts, "ROWS_A_SHARD", 1)
    folder = tmp_path / ".out.parts"
    folder.mkdir()
    with hold(folder / "part-000000.lock", UserError):
        assert run("--source", manifest, "--out", tmp_path / "out", "--processes", 1) == 2
    assert multiprocessing.active_children() == []
    assert "part-000000: this part is being made by process " in capsys.readouterr().err


def stamps(folder):
    """When each part was made."""
    return {p.name: (p / "part.json").stat().st_mtime_ns for p in folder.iterdir()}


def test_what_is_finished_is_not_done_again(manifest, tmp_path, capsys, monkeypatch, parts_of_two):
    """After bad rows, after a corrected line, after a picture that changed: the parts that these are in, and no others."""
    good = manifest.read_text().splitlines()
    broken = [*good, good[0].replace("astronaut.png", "gone.png"), *good]
    write_lines(manifest.parent, broken)
    command = ("--source", manifest, "--out", tmp_path / "out", "--processes", 1)
    assert run(*command) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("row 5: ") and "gone.png" in told[0] and "the good rows are kept in" in told[1]
    assert parts_of_two == [f"part-{n:06d}" for n in range(5)] and left_behind(tmp_path) == [".out.parts"]
    before = stamps(tmp_path / ".out.parts")
    write_lines(manifest.parent, [*good, good[0], *good])
    monkeypatch.setattr(prepare, "join", lambda work, folders: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a stop before the end
        run(*command)
    after = stamps(tmp_path / ".out.parts")
    assert {name for name in after if after[name] != before[name]} == {"part-000002"}
    monkeypatch.setattr(prepare, "join", join)
    assert run(*command) == 0
    assert run("--source", manifest, "--out", tmp_path / "threads") == 0
    same_datasets(tmp_path / "out", tmp_path / "threads")
    info = json.loads((tmp_path / "out" / store.INFO).read_text())
    assert info["splits"][0]["shardLengths"] == ["2", "2", "2", "2", "1"]
    assert left_behind(tmp_path) == ["out", "threads"]


def test_a_part_is_made_again_if_its_files_or_limits_are_others(manifest, tmp_path):
    rows = list(read_manifest(manifest).rows)
    folder = tmp_path / "part-000000"
    first = parts.make_part(rows, folder, Limits())
    stamp = (folder / "part.json").stat().st_mtime_ns
    assert parts.make_part(rows, folder, Limits()) == first and (folder / "part.json").stat().st_mtime_ns == stamp
    assert parts.make_part(rows, folder, Limits(min_side=301)).written < first.written
    changed = parts.make_part(rows, folder, Limits())
    assert changed.written == first.written == 4
    (manifest.parent / "rocket.png").write_bytes(photo("coffee"))
    parts.make_part(rows, folder, Limits())
    assert open_dataset(folder)[3].target == photo("coffee")
    rows[0] = rows[0]._replace(caption="another")
    parts.make_part(rows, folder, Limits())
    assert open_dataset(folder)[0].caption == "another" and sorted(p.name for p in tmp_path.glob("part*")) == [
        "part-000000"
    ]
    (folder / "part.json").write_text("[" * 4000)
    assert parts.make_part(rows, folder, Limits()).written == 4


def test_hosts_do_a_share_each(manifest, tmp_path, capsys, parts_of_two):
    lines = manifest.read_text().splitlines()
    write_lines(manifest.parent, lines * 2)
    command = ("--source", manifest, "--out", tmp_path / "out", "--processes", 1)
    for share in ("1/3", "3/3", "2/3"):
        assert run(*command, "--share", share) == 0
        assert f"part {share[0]} of 3 is done" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert sorted(parts_of_two) == [f"part-{n:06d}" for n in range(4)]
    assert run(*command) == 0 and len(parts_of_two) == 4
    assert open_dataset(tmp_path / "out").numbers.tolist() == list(range(1, 9))


def test_rows_that_are_all_bad_make_no_dataset(manifest, tmp_path, capsys, parts_of_two):
    manifest.write_text("{}\n{}\n{}\n")
    assert run("--source", manifest, "--out", tmp_path / "out", "--processes", 1, "--skip-bad") == 2
    assert "no rows are left" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


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
        (["--source", "photos", "--processes", "0"], "--processes 0: expected from 1 to 1024"),
        (["--source", "photos", "--share", "1/2"], "--share 1/2: expected --processes with it"),
        (["--source", "photos", "--processes", "1", "--share", "3/2"], "--share 3/2: expected I/N"),
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
