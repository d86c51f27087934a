"""PNG files: what cannot be written is said beforehand, and a picture that was made is not lost."""

import errno
import json
import os
import stat
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from dynaip_jax import images
from dynaip_jax.errors import UserError
from dynaip_jax.images import writing
from tests.images.test_files import refused


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The current, the home and the temporary folder, all new."""
    folders = {name: tmp_path / name for name in ("current", "home", "temporary")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.chdir(folders["current"])
    monkeypatch.setenv("HOME", str(folders["home"]))
    monkeypatch.setattr(tempfile, "tempdir", str(folders["temporary"]))
    return folders


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def failing(monkeypatch, *folders, error=errno.ENOSPC):
    """Writing in these folders fails as on a full disk (or with another `error`), once a file is open."""
    sync = os.fsync

    def fsync(handle):
        where = Path(os.readlink(f"/proc/self/fd/{handle}")).parent
        if where in folders:
            raise OSError(error, os.strerror(error))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def names(*folders):
    return [sorted(path.name for path in folder.iterdir()) for folder in folders]


def test_what_cannot_be_written_is_known_before_the_work(out, monkeypatch):
    def asked(path):
        images.check_png_path(path, overwrite=True)

    assert "folder's name" in refused(f"{out}/x.png/", asked)
    assert "too long" in str(pytest.raises(UserError, asked, out / f"{'a' * 300}.png").value)
    assert "too long" in str(pytest.raises(UserError, asked, out / ("b" * 300) / "a.png").value)
    asked(out / f"{'a' * 250}.png")
    os.mkfifo(out / "pipe.png")
    assert "device or a pipe" in refused(out / "pipe.png", asked)
    failing(monkeypatch, out)
    assert "nothing can be saved there (No space left on device)" in refused(out / "a.png", asked)
    failing(monkeypatch, out, error=errno.EROFS)
    assert "Read-only file system" in refused(out / "a.png", asked)
    assert names(out) == [["pipe.png"]]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_closed_folder_is_known_before_the_work(out):
    (out / "closed").mkdir(mode=0o500)
    message = refused(out / "closed" / "a.png", lambda path: images.check_png_path(path, overwrite=False))
    assert "Permission denied" in message


def test_a_long_name_is_written(out, photo):
    path = out / f"{'a' * 250}.png"
    images.save_png(photo, path, {"seed": 1})
    assert images.read_settings(path) == {"seed": 1} and names(out) == [[path.name]]


def test_a_name_that_was_taken_meanwhile(out, photo):
    (out / "a.png").write_text("another's")
    (out / "a-1.png").write_text("too")
    kept = images.keep_png(photo, out / "a.png", {"seed": 1})
    assert kept.path == out / "a-2.png" and "exists already" in kept.reason
    assert images.read_settings(kept.path) == {"seed": 1} and (out / "a.png").read_text() == "another's"
    assert names(out) == [["a-1.png", "a-2.png", "a.png"]]


def test_a_name_that_is_taken_between_look_and_rename(out, photo, monkeypatch):
    """The look comes first; the name is then claimed by the system in one step."""
    link = os.link

    def late(source, target):
        if Path(target).name == "a.png":
            Path(target).write_text("another's")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    kept = images.keep_png(photo, out / "a.png", {})
    assert kept.path == out / "a-1.png" and (out / "a.png").read_text() == "another's"


def test_a_disk_without_links(out, photo, monkeypatch):
    def none(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    assert images.keep_png(photo, out / "a.png", {}) == (out / "a.png", None)
    assert images.keep_png(photo, out / "a.png", {}).path == out / "a-1.png"
    images.save_png(photo, out / "b.png", {"seed": 3})
    assert images.read_settings(out / "b.png") == {"seed": 3} and names(out) == [["a-1.png", "a.png", "b.png"]]


def test_a_disk_that_is_full_by_now(out, photo, elsewhere, monkeypatch):
    failing(monkeypatch, out)
    kept = images.keep_png(photo, out / "a.png", {"seed": 1})
    assert kept == (elsewhere["current"] / "a.png", "No space left on device")
    assert images.read_settings(kept.path) == {"seed": 1} and names(out) == [[]]
    failing(monkeypatch, out, elsewhere["current"])
    assert images.keep_png(photo, out / "a.png", {}).path == elsewhere["home"] / "a.png"
    failing(monkeypatch, out, *list(elsewhere.values())[:2])
    assert images.keep_png(photo, out / "a.png", {}).path == elsewhere["temporary"] / "a.png"
    failing(monkeypatch, out, *elsewhere.values())
    with pytest.raises(UserError, match="the picture is lost"):
        images.keep_png(photo, out / "a.png", {})
    assert names(out, *elsewhere.values()) == [[], ["a.png"], ["a.png"], ["a.png"]]


def test_a_folder_that_is_gone_by_now(out, photo, elsewhere):
    out.rmdir()
    kept = images.keep_png(photo, out / "a.png", {})
    assert kept.path == elsewhere["current"] / "a.png" and "No such file" in kept.reason


def test_a_name_that_only_this_disk_finds_too_long(out, photo, monkeypatch):
    lstat = Path.lstat

    def short(path):
        if len(path.name) > 143:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", short)
    kept = images.keep_png(photo, out / f"{'a' * 200}.png", {})
    assert kept.path == out / f"{'a' * writing.SHORT}.png" and "too long" in kept.reason


def test_overwriting_leaves_one_whole_file_of_the_usual_mode(out, photo):
    (out / "touched").touch()
    for seed in (1, 2):
        assert images.keep_png(Image.fromarray(photo), out / "a.png", {"seed": seed}, overwrite=True).reason is None
    assert json.loads(Image.open(out / "a.png").text["dynaip"]) == {"seed": 2}
    assert stat.S_IMODE((out / "a.png").stat().st_mode) == stat.S_IMODE((out / "touched").stat().st_mode)
    assert names(out) == [["a.png", "touched"]]
