"""Renames that replace nothing unasked, and files that appear whole."""

import os

import pytest

from dynaip_jax.storage import renames
from dynaip_jax.storage.renames import exchange, move_new, partials, sync_tree, write_new


@pytest.fixture(params=["renameat2", "without it"])
def system(request, monkeypatch):
    if request.param == "without it":
        monkeypatch.setattr(renames, "_renameat2", lambda source, target, flags: False)


def make(path, kind):
    if kind == "folder":
        path.mkdir()
        (path / "file").write_text("mine")
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        path.write_text("mine")


@pytest.mark.parametrize("there", ["folder", "file", "link"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_nothing_is_replaced(system, tmp_path, kind, there):
    new, old = tmp_path / "new", tmp_path / "old"
    make(new, kind)
    make(old, there)
    with pytest.raises(FileExistsError):
        move_new(new, old)
    assert new.exists() and os.path.lexists(old) and old.is_symlink() == (there == "link")
    move_new(new, tmp_path / "free")
    assert not new.exists() and (tmp_path / "free").is_dir() == (kind == "folder")


def test_without_renameat2_what_comes_into_the_empty_folder_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(renames, "_renameat2", lambda source, target, flags: False)
    make(tmp_path / "new", "folder")
    mkdir = os.mkdir

    def raced(path):
        mkdir(path)
        (tmp_path / "old" / "thesis").write_text("mine")

    monkeypatch.setattr(renames.os, "mkdir", raced)
    with pytest.raises(FileExistsError):
        move_new(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "thesis").read_text() == "mine" and (tmp_path / "new" / "file").exists()


def test_two_swap(tmp_path):
    make(tmp_path / "one", "folder")
    make(tmp_path / "two", "file")
    if not exchange(tmp_path / "one", tmp_path / "two"):
        pytest.skip("this file system swaps nothing")
    assert (tmp_path / "one").is_file() and (tmp_path / "two" / "file").is_file()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "three")


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, events = tmp_path / "file", []
    path.write_text("old")
    fsync, replace = os.fsync, os.replace

    def synced(file):
        events.append(("sync", os.fstat(file).st_ino))
        fsync(file)

    def replaced(source, target):
        events.append(("rename", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(renames.os, "fsync", synced)
    monkeypatch.setattr(renames.os, "replace", replaced)
    write_new(path, b"new")
    inode = path.stat().st_ino
    assert events == [("sync", inode), ("rename", inode), ("sync", tmp_path.stat().st_ino)]
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_no_link_is_written_through(tmp_path, monkeypatch):
    """Even one whose name was guessed."""
    secret, path = tmp_path / "secret", tmp_path / "file"
    secret.write_text("mine")
    monkeypatch.setattr(renames.secrets, "token_hex", lambda n: "00")
    (tmp_path / ".file.00.partial").symlink_to(secret)
    with pytest.raises(FileExistsError):
        write_new(path, b"new")
    monkeypatch.undo()
    path.symlink_to(secret)
    write_new(path, b"new")
    assert secret.read_text() == "mine" and not path.is_symlink() and path.read_bytes() == b"new"


def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(renames.os, "replace", lambda source, target: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_new(tmp_path / "file", b"new")
    assert not list(tmp_path.iterdir())
    (tmp_path / ".file.12345678.partial").write_bytes(b"")
    (tmp_path / ".other.partial").mkdir()
    assert [path.name for path in partials(tmp_path)] == [".file.12345678.partial"]


def test_one_mode_and_all_of_it_on_the_disk(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for path, mode in ((folder / "a", 0o600), (folder / "deep" / "b", 0o777)):
        path.write_text("x")
        path.chmod(mode)
    folder.chmod(0o750)
    (folder / "deep").chmod(0o700)
    synced = []
    monkeypatch.setattr(renames.os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    sync_tree(folder)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    assert modes == dict(folder=0o750, deep=0o750, a=0o640, b=0o640)
    assert sorted(synced) == sorted(path.stat().st_ino for path in (folder, *folder.rglob("*")))
    assert synced[-1] == folder.stat().st_ino
