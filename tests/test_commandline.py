"""What commands share: arguments as a dataclass, complaints of one line, flags in place of options' names."""

import gc
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from dynaip_jax.commandline import argument, parse, parse_known, run_cli, run_tyro
from dynaip_jax.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Packs boxes."""

    box: Path = argument("where to", unit="BOX")
    item: tuple[str, ...] = argument("what", unit="ITEM", repeat=True)
    tag: tuple[str, ...] = argument("more", default=(), unit="TAG", repeat=True, group="label")
    colours: tuple[Literal["red", "blue"], ...] = argument("of the box", default=("red",), group="label")
    count: int | None = argument("how many", default=None, usual="all", unit="N")
    size: tuple[float, float, float] | None = argument("of the box", default=None, unit="X Y Z")
    wrap_up: bool = argument("in paper", default=False)


NEEDED = ("--box", "b", "--item", "a")


def test_values_and_defaults():
    assert parse(Arguments, NEEDED, "pack") == Arguments(box=Path("b"), item=("a",))
    words = "--item=c --tag t --wrap-up --wrap-up --colours blue red --count 1 --count 2 --size 1 -2 .5".split()
    assert parse(Arguments, [*NEEDED, *words], "pack") == Arguments(
        box=Path("b"),
        item=("a", "c"),
        tag=("t",),
        colours=("blue", "red"),
        count=2,
        size=(1.0, -2.0, 0.5),
        wrap_up=True,
    )


@pytest.mark.parametrize("box", ["gs://bucket/box", "s3://bucket/box"])
def test_a_bucket_is_no_local_folder(box):
    with pytest.raises(UserError, match=f"`box` {box}: lies in a bucket; expected a path on a disk"):
        parse(Arguments, ["--box", box, "--item", "a"], "pack")
    assert parse(Arguments, ["--box", "a/gs:/b", "--item", "gs://x"], "pack").item == ("gs://x",)


def test_other_words_are_handed_on_in_order():
    words = ["--data.clip_size", "3", *NEEDED, "--data.path", "-1", "--fields", "x"]
    assert parse_known(Arguments, words, "pack")[1] == ["--data.clip_size", "3", "--data.path", "-1", "--fields", "x"]


@pytest.mark.parametrize(
    ("words", "message"),
    (
        ("--box b", "`item`: no value given; expected at least one; see pack --help"),
        ("--item a", "Missing from pack: --box BOX where to (required); see pack --help"),
        ("--box b --item a --colours", "`colours`: no value given; expected at least one; see pack --help"),
        ("--box b --item a --colours red green", "--colours: invalid choice: 'green' (choose from 'red', 'blue'); see pack --help"),
        ("--box b --item a --count x", "Error parsing --count: invalid literal for int() with base 10: 'x'; see pack --help"),
        ("--box b --item a --count None", "Error parsing --count: invalid literal for int() with base 10: 'None'; see pack --help"),
        ("--box b --item a --size 1 2", "Missing value for argument '--size'. Expected 3 values; see pack --help"),
        ("--box b --item a --no-wrap-up", "unrecognized arguments: --no-wrap-up; see pack --help"),
        (f"--box b --item a {'long/' * 40}", f"unrecognized arguments: {'long/' * 40}; see pack --help"),
    ),
)  # fmt: skip
def test_complaints_are_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    with pytest.raises(UserError) as raised:
        parse(Arguments, words.split(), "pack")
    assert str(raised.value) == message and capsys.readouterr() == ("", "")


def test_help_tells_units_defaults_and_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Arguments, ["--help"], "pack", "\nexamples:\n  pack --box b\n")
    assert not stopped.value.code
    lines = [" ".join(line.strip("│| ").split()) for line in capsys.readouterr().out.splitlines()]
    assert "Packs boxes." in lines and lines[-2:] == ["examples:", "pack --box b"]
    text = " ".join(lines)
    assert "--count N how many (default: all)" in text and "--colours" in text and "of the box (default: red)" in text
    assert (
        "--size X Y Z of the box" in text
        and "--wrap-up in paper" in text
        and "None" not in text
        and "no-wrap" not in text
    )


def test_help_reads_no_source_files(capsys, monkeypatch):
    """Python's parser may fail beside another thread."""

    def refuse(*_):
        raise AssertionError("source is read")

    monkeypatch.setattr("inspect.getsource", refuse)
    with pytest.raises(SystemExit):
        parse(Arguments, ["--help"], "pack")
    with pytest.raises(UserError):
        parse(Arguments, ["--count", "x"], "pack")


def test_errors_name_flags(capsys):
    def fails(argv):
        raise UserError("`true_cfg` 3: needs `words`; see `data.path`")

    assert run_cli(fails, [], dict(words="--subject")) == 2
    assert capsys.readouterr().err == "error: --true-cfg 3: needs --subject; see --data.path\n"

    def interrupted(argv):
        raise KeyboardInterrupt

    assert run_cli(interrupted, []) == 130


def test_run_tyro_takes_any_type():
    assert run_tyro(Arguments, ("--box", "b", "--item", "a", "c"), see="pack").item == ("a", "c")


def test_a_parser_beside_another_thread_is_tried_again(monkeypatch):
    """CPython 3.11 raises this where two threads parse source at once."""
    import tyro

    calls, cli = [], tyro.cli

    def failing(*args, **options):
        calls.append(args)
        if len(calls) < 3:
            raise SystemError("AST constructor recursion depth mismatch (before=195, after=20)")
        return cli(*args, **options)

    monkeypatch.setattr("tyro.cli", failing)
    assert run_tyro(Arguments, ("--box", "b", "--item", "a"), see="pack").item == ("a",) and len(calls) == 3

    def broken(*args, **options):
        raise SystemError("something else")

    monkeypatch.setattr("tyro.cli", broken)
    with pytest.raises(SystemError, match="something else"):
        run_tyro(Arguments, ("--box", "b"), see="pack")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(13, "Permission denied", "/closed/x"),
            "/closed/x: Permission denied; expected files and folders",
        ),
        (OSError("odd"), "the system: odd; expected"),
        (MemoryError(), "memory: MemoryError; there is not enough"),
        (RecursionError("maximum recursion depth exceeded"), "input: nested too deep"),
    ],
)
def test_what_nobody_foresaw_is_one_line(capsys, error, message):
    def fails(argv):
        raise error

    assert run_cli(fails, []) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: {message}") and stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["sample", "--help"], ["--version"]])
def test_a_reader_that_leaves_ends_a_command_without_a_word(words):
    """As `dynaip sample --help | head -1` does; also where all that is written waits in the buffer until the end."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from dynaip_jax.app.main import main; import sys; sys.exit(main())", *words]
    with os.fdopen(write) as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (141, "")


def test_what_was_never_begun_is_not_warned_of():
    """Orbax gives up writes that it had not begun when another one failed. Other warnings are still printed."""

    async def write():
        pass

    def main(argv):
        write()
        gc.collect()
        warnings.warn("another", RuntimeWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_cli(main, [])
    assert [str(warning.message) for warning in caught] == ["another"]
