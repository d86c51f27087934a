"""What a writer of a folder may replace, what comes meanwhile, and what kills leave."""

import os
import re
import signal
import subprocess
import sys

import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.storage import folders, renames
from dynaip_jax.storage.folders import copy_tree, replacing

MARK = "what.json"
WRITE = """
import os, sys
from dynaip_jax.storage import folders, renames
def end(*args, **options): os.kill(os.getpid(), 9)
{before}
with folders.replacing(sys.argv[1], overwrite=True, marks=("what.json",)) as work:
    (work / "what.json").write_text("new")
    (work / "more").write_text("new")
    {during}
"""


def write(path, text="new", *, overwrite=False, meanwhile=lambda: None):
    with replacing(path, overwrite=overwrite, marks=(MARK,)) as work:
        (work / MARK).write_text(text)
        (work / "more").write_text(text)
        meanwhile()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["renameat2", "without it"])
def system(request, monkeypatch):
    if request.param == "without it":
        monkeypatch.setattr(renames, "_renameat2", lambda source, target, flags: False)


FOREIGN = {
    "file": lambda path: path.write_text("mine"),
    "folder": lambda path: (path.mkdir(), (path / "thesis").write_text("mine")),
    "empty folder": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("/"),
    "dead link": lambda path: path.symlink_to("nowhere"),
    "fifo": os.mkfifo,
}


def looks(path):
    """What can be told of it without following it."""
    stat = os.lstat(path)
    return stat.st_ino, stat.st_mode, names(path) if path.is_dir() else None


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_appears_meanwhile_stays(system, tmp_path, kind):
    out, before = tmp_path / "out", []

    def appears():
        FOREIGN[kind](out)
        before.append(looks(out))

    (tmp_path / "out-1").mkdir()
    with pytest.raises(UserError, match=f"`out` {out}: something else came there .* is whole in {out}-2; rename it"):
        write(out, meanwhile=appears)
    assert looks(out) == before[0]
    assert (tmp_path / "out-2" / MARK).read_text() == "new" and names(tmp_path) == ["out", "out-1", "out-2"]


@pytest.mark.parametrize("kind", [k for k in FOREIGN if k != "empty folder"])
def test_overwrite_replaces_no_other_thing_that_appears_meanwhile(system, tmp_path, kind):
    out, before = tmp_path / "out", []
    write(out, "old")

    def appears():
        out.rename(tmp_path / "moved")
        FOREIGN[kind](out)
        before.append(looks(out))

    with pytest.raises(UserError, match="something else came there"):
        write(out, overwrite=True, meanwhile=appears)
    assert looks(out) == before[0] and (tmp_path / "moved" / MARK).read_text() == "old"
    assert (tmp_path / "out-1" / MARK).read_text() == "new" and names(tmp_path) == ["moved", "out", "out-1"]


@pytest.mark.parametrize("kind", [k for k in FOREIGN if k != "empty folder"])
def test_not_even_between_the_look_and_the_rename(system, tmp_path, monkeypatch, kind):
    out, before, look = tmp_path / "out", [], folders._may_go
    write(out, "old")

    def raced(path, marks=()):
        answer = look(path, marks)
        if path == out and (out / MARK).is_file() and not before:
            out.rename(tmp_path / "moved")
            FOREIGN[kind](out)
            before.append(looks(out))
        return answer

    def meanwhile():
        monkeypatch.setattr(folders, "_may_go", raced)

    with pytest.raises(UserError, match="something else came there"):
        write(out, overwrite=True, meanwhile=meanwhile)
    assert looks(out) == before[0] and (tmp_path / "out-1" / MARK).read_text() == "new"
    assert names(tmp_path) == ["moved", "out", "out-1"]


@pytest.mark.parametrize(
    "kind, found",
    [("file", "is no folder"), ("fifo", "is no folder"), ("link", "is a link"), ("dead link", "is a link")],
)
def test_overwrite_is_for_folders(tmp_path, kind, found):
    out = tmp_path / "out"
    FOREIGN[kind](out)
    before = looks(out)
    with pytest.raises(UserError, match=f"`out` {out}: {found}"):
        write(out, overwrite=True)
    with pytest.raises(UserError, match=f"`out` {out}: already exists"):
        write(out)
    assert looks(out) == before and names(tmp_path) == ["out"]


def test_replaced_in_one_step_or_two(system, tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    write(out, overwrite=True)
    assert (out / MARK).read_text() == "new" and names(tmp_path) == ["out"]


def test_the_second_of_two_writers_is_refused_at_once(tmp_path):
    out, told = tmp_path / "out", []

    def second():
        with pytest.raises(UserError) as e:
            write(out, overwrite=True)
        told.append(str(e.value))

    write(out, meanwhile=second)
    assert f"`out` {out}: is being written by process {os.getpid()} on " in told[0]
    assert (out / MARK).read_text() == "new" and names(tmp_path) == ["out"]


def killed(path, during="", before=""):
    script = WRITE.format(during=during or "pass", before=before)
    child = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr


WITHOUT = "renames._renameat2 = lambda *args: False\n"
HALF = """
def gone(path, **options):
    if (path / "what.json").is_file():
        (path / "what.json").unlink()
        end()
folders.shutil.rmtree = gone
"""
MOMENTS = {  # of a kill: (what is run before the writer, in it, what stands at the target then)
    "while it is written": ("", "end()", "old"),
    "before the renames": ("folders._put = end", "", "old"),
    "once swapped": ("swap = folders.exchange; folders.exchange = lambda *two: swap(*two) and end()", "", "new"),
    "while the old one goes": (HALF, "", "new"),
    "between two renames": (f"{WITHOUT}folders.move_new = end", "", None),
    "after two renames": (f"{WITHOUT}move = folders.move_new; folders.move_new = lambda *two: (move(*two), end())", "", "new"),
}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_leaves_one_whole_and_the_next_writer_no_litter(tmp_path, moment):
    before, during, left = MOMENTS[moment]
    out = tmp_path / "out"
    write(out, "old")
    killed(out, during, before)
    assert left is None or (out / MARK).read_text() == left
    assert all(name == "out" or re.fullmatch(r"\.out\.(lock|dynaip-\w+\.(part|old))", name) for name in names(tmp_path))
    if left is None:  # comes back, and is refused as what it is
        with pytest.raises(UserError, match="already exists"):
            write(out)
        assert (out / MARK).read_text() == "old"
    write(out, "newest", overwrite=True)
    assert (out / MARK).read_text() == "newest" and names(tmp_path) == ["out"]


def test_litter_that_is_somebody_elses_stays(tmp_path):
    kept = [".out.dynaip-12345678", ".out.dynaip-1234567z.part", ".other.dynaip-12345678.part", ".out.part"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.dynaip-00000000.part").write_text("a file")
    (tmp_path / ".out.dynaip-00000001.part").symlink_to(tmp_path / ".out.part")
    foreign = tmp_path / ".out.dynaip-00000002.old"  # came in the place of the target between two renames
    FOREIGN["folder"](foreign)
    (tmp_path / ".out.dynaip-00000003.part").mkdir()
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == sorted(
        [*kept, "out", foreign.name, ".out.dynaip-00000000.part", ".out.dynaip-00000001.part"]
    )


def test_a_writer_to_a_bucket_is_alone_and_tidy(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    out, told = f"{bucket}/out", []

    def second():
        (work,) = [path for path in tmp_path.iterdir() if path.is_dir()]
        assert work.stat().st_mode & 0o777 == 0o700
        with pytest.raises(UserError, match="is being written by"):
            write(out)
        told.append(True)

    write(out, meanwhile=second)
    assert told and not names(tmp_path)
    target = folders.as_path(out)

    def appears():
        for path in target.iterdir():
            path.unlink()
        (target / "thesis").write_text("mine")

    with pytest.raises(UserError, match=f"something else came there .* {out}-1"):
        write(out, "newer", overwrite=True, meanwhile=appears)
    assert (target / "thesis").read_text() == "mine"
    assert (folders.as_path(f"{out}-1") / MARK).read_text() == "newer" and not names(tmp_path)


def test_one_mode_whatever_wrote_it(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "out", overwrite=False, marks=(MARK,)) as work:
            (work / "deep").mkdir(0o700)
            os.close(os.open(work / "deep" / MARK, os.O_CREAT, 0o600))
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out", tmp_path / "out" / "deep")} == {0o750}
    assert (tmp_path / "out" / "deep" / MARK).stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("kind", ["link", "dead link", "fifo", "loop"])
def test_only_plain_files_are_copied(tmp_path, kind):
    (tmp_path / "source" / "deep").mkdir(parents=True)
    bad = tmp_path / "source" / "deep" / "bad"
    bad.symlink_to(".") if kind == "loop" else FOREIGN[kind](bad)
    with pytest.raises(UserError, match=f"{bad}: a link, or no plain file"):
        copy_tree(tmp_path / "source", tmp_path / "copy")
    (tmp_path / "linked").symlink_to(tmp_path / "source")
    with pytest.raises(UserError, match="linked: a link"):
        copy_tree(tmp_path / "linked", tmp_path / "copy")


def test_a_writer_of_the_same_goes_on_with_what_was_left(tmp_path):
    out, key = tmp_path / "out", "ab12cd34" * 8
    left, other = (tmp_path / f".out.dynaip-{name}.part" for name in ("ab12cd34", "00000000"))
    for folder in (left, other):
        folder.mkdir()
        (folder / "half").write_text("half")
    with replacing(out, overwrite=False, marks=(MARK,), resume=key) as work:
        assert work == left and (work / "half").read_text() == "half" and not other.exists()
        (work / "half").rename(work / MARK)
    assert names(tmp_path) == ["out"] and names(out) == [MARK]
    left.symlink_to(out)
    with pytest.raises(UserError, match="cannot write there"):  # a link is not followed
        with replacing(out, overwrite=True, marks=(MARK,), resume=key):
            pass
    left.unlink()
    with pytest.raises(ValueError):
        with replacing(out, overwrite=True, marks=(MARK,), resume=key):
            raise ValueError
    assert names(tmp_path) == ["out"] and names(out) == [MARK]


def test_a_folder_that_may_not_be_written():
    with pytest.raises(UserError, match="cannot write there"):
        write("/proc/out")
