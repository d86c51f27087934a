"""Folders that appear whole or not at all, on disk and in a bucket."""

from pathlib import Path

import pytest
from etils import epath

from dynaip_jax.errors import UserError
from dynaip_jax.storage import folders
from dynaip_jax.storage.folders import UNFINISHED, as_path, copy_tree, is_bucket, local_copy, replacing
from tests.fake_bucket import FakeBucket

MARK = "what.json"


def write(path, text, *, overwrite=False, fail=None):
    with replacing(path, overwrite=overwrite, marks=(MARK,)) as work:
        (work / MARK).write_text(text)
        (work / "deep").mkdir()
        (work / "deep" / "a").write_text(text)
        if fail is not None:
            raise fail


def content(path):
    path = as_path(path)
    files = {f.name: f.read_text() for f in path.iterdir() if f.is_file()}
    return files | {f"deep/{f.name}": f.read_text() for f in (path / "deep").iterdir()}


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path, bucket):
    return str(tmp_path) if request.param == "disk" else bucket


def test_paths():
    assert type(as_path("a/b")) is type(Path()) and as_path(Path("~/x")) == Path("~/x")
    assert not is_bucket("a/gs:/b") and is_bucket("gs://a")


def test_a_bucket_is_an_epath(bucket):
    path = as_path(f"{bucket}/a/b")
    assert isinstance(path, epath.Path) and is_bucket(path) and str(path / "c") == "gs://bucket/a/b/c"
    assert as_path(path) == path


def test_a_bucket_without_its_client(monkeypatch):
    import fsspec

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UserError, match="gs://a: buckets need gcsfs, which is not installed; pip install gcsfs"):
        as_path("gs://a")


def test_written_and_replaced(place):
    path = f"{place}/out"
    write(path, "one")
    assert content(path) == {MARK: "one", "deep/a": "one"}
    with pytest.raises(UserError, match=r"`out` .*/out: already exists; .* pass `overwrite`"):
        write(path, "two")
    (as_path(path) / "old").write_text("old")
    write(path, "two", overwrite=True)
    assert content(path) == {MARK: "two", "deep/a": "two"}
    assert [p.name for p in as_path(place).iterdir()] == ["out"]


def test_something_else_is_not_replaced(place):
    path = as_path(place) / "out"
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else .there is no what.json in it"):
        write(path, "one", overwrite=True)
    assert (path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(("fail", "raised"), [(OSError(28, "No space left"), UserError), (KeyError("x"), KeyError)])
def test_what_fails_changes_nothing(place, fail, raised):
    path = f"{place}/out"
    write(path, "one")
    with pytest.raises(raised) as e:
        write(path, "two", overwrite=True, fail=fail)
    if raised is UserError:
        assert f"`out` {path}: writing failed (No space left); nothing was changed" in str(e.value)
    assert content(path) == {MARK: "one", "deep/a": "one"}
    assert [p.name for p in as_path(place).iterdir()] == ["out"]


def test_in_a_bucket_the_manifest_comes_last(bucket):
    write(f"{bucket}/out", "one")
    assert FakeBucket.written == [f"/bucket/out/{UNFINISHED}", "/bucket/out/deep/a", f"/bucket/out/{MARK}"]
    assert content(as_path(f"{bucket}/out")) == {MARK: "one", "deep/a": "one"}


def test_a_copy_that_stops_is_not_whole(bucket, monkeypatch):
    path = as_path(bucket) / "out"
    write(path, "one")

    opened = FakeBucket._open

    def full(self, path, *args, **options):
        if few and path.endswith(UNFINISHED):
            return opened(self, path, *args, **options)
        raise RuntimeError("quota exceeded\nsee the console")

    few = False
    with monkeypatch.context() as patch:
        patch.setattr(FakeBucket, "_open", full)
        with pytest.raises(UserError, match="writing failed .quota exceeded see the console.; nothing was changed"):
            write(path, "two", overwrite=True)
    assert content(path) == {MARK: "one", "deep/a": "one"}
    few = True
    with monkeypatch.context() as patch:
        patch.setattr(FakeBucket, "_open", full)
        with pytest.raises(
            UserError, match="`out` gs://bucket/out: writing failed .quota exceeded see the console.; .*not whole"
        ):
            write(path, "two", overwrite=True)
    assert not (path / MARK).exists()
    with pytest.raises(UserError, match="already exists"):
        write(path, "two")
    with monkeypatch.context() as patch:  # a kill between two files
        patch.setattr(folders, "copy_file", lambda *_: 1 / 0)
        with pytest.raises(UserError, match="what lies there now is not whole"):
            write(path, "two", overwrite=True)
    write(path, "two", overwrite=True)
    assert content(path) == {MARK: "two", "deep/a": "two"}


def test_copies(tmp_path, bucket):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a").write_bytes(b"\x00\xff")
    source, copy = tmp_path / "deep", as_path(bucket) / "x"
    copy_tree(source, copy)
    assert (copy / "er" / "a").read_bytes() == b"\x00\xff"
    with local_copy(copy) as folder:
        assert isinstance(folder, Path) and folder.name == "x" and (folder / "er" / "a").read_bytes() == b"\x00\xff"
    assert not folder.exists()
    with local_copy(copy / "er" / "a") as file:
        assert file.read_bytes() == b"\x00\xff"
    with local_copy(source) as folder:
        assert folder == source
    assert source.is_dir()
