"""A folder of compiled programs that was cut short repairs itself."""

import fcntl
import sys
import zlib

import pytest
from jax._src.lru_cache import LRUCache

from dynaip_jax.runtime.compiling import keep_compiled
from dynaip_jax.runtime.repairing import LOCK, WHOLE, repair

PROGRAM = bytes(range(256)) * 64


@pytest.fixture
def folder(tmp_path):
    cache = LRUCache(str(tmp_path), max_size=1 << 20)
    for name in ("a", "b", "c"):
        cache.put(name, zlib.compress(PROGRAM))
    return tmp_path


def names(folder):
    return {path.name for path in folder.glob("*-*")}


WELL = {"a-atime", "a-cache", "b-atime", "b-cache", "c-atime", "c-cache"}


@pytest.mark.parametrize("damage", ["cut", "empty", "changed"])
def test_a_damaged_program_goes_and_is_told_of(folder, capsys, damage):
    file = folder / "b-cache"
    content = file.read_bytes()
    wrong = dict(cut=content[:-10], empty=b"", changed=content[:-3] + b"xyz")
    file.write_bytes(wrong[damage])
    repair(folder)
    assert names(folder) == WELL - {"b-cache", "b-atime"}
    assert capsys.readouterr().err == f"{folder}: 1 damaged compiled programs removed; they are compiled again\n"
    repair(folder)
    assert capsys.readouterr().err == "" and names(folder) == WELL - {"b-cache", "b-atime"}


def test_what_a_kill_left_keeps_no_other_program_out(folder):
    (folder / "a-atime").unlink()
    (folder / "b-atime").write_bytes(b"")
    (folder / "d-atime").write_bytes(bytes(8))
    cache = LRUCache(str(folder), max_size=1 << 20)
    with pytest.raises(FileNotFoundError):
        cache.put("e", zlib.compress(PROGRAM))
    repair(folder)
    assert names(folder) == WELL
    cache.put("e", zlib.compress(PROGRAM))
    assert cache.get("e") and cache.get("a")


def test_whole_ones_are_read_once_and_others_are_left_alone(folder, monkeypatch):
    (folder / "z-cache").write_bytes(b"\x28\xb5\x2f\xfd, compressed otherwise")
    (folder / "z-atime").write_bytes(bytes(8))
    read = []
    monkeypatch.setattr("dynaip_jax.runtime.repairing._is_whole", lambda path: read.append(path.name) or True)
    repair(folder)
    assert sorted(read) == ["a-cache", "b-cache", "c-cache", "z-cache"]
    repair(folder)
    assert len(read) == 4
    (folder / "a-cache").write_bytes(zlib.compress(PROGRAM + b"new"))
    repair(folder)
    assert read[4:] == ["a-cache"]
    monkeypatch.undo()
    (folder / WHOLE).write_text("[" * 100_000)
    repair(folder)
    assert names(folder) == WELL | {"z-cache", "z-atime"}


def test_a_program_that_is_just_written_stays(folder):
    (folder / "b-cache").write_bytes(b"\x78")
    with open(folder / LOCK, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        repair(folder)
        assert names(folder) == WELL
    repair(folder)
    assert "b-cache" not in names(folder)


def test_commands_repair_it(folder, monkeypatch):
    (folder / "b-cache").write_bytes(b"")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
    monkeypatch.delitem(sys.modules, "jax")  # whose cache is not to move
    keep_compiled()
    assert "b-cache" not in names(folder)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "missing"))
    keep_compiled()
    assert not list((folder / "missing").iterdir())
