"""What every command shares: its arguments, its frame, and how errors name options there. tyro reads the words of a command; it
is imported when it is needed, so that --version and a list of commands answer at once."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
import select
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Required,
    TypedDict,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from dynaip_jax import interrupts
from dynaip_jax.errors import UserError, reason
from dynaip_jax.platforms import leave_absent_tpus
from dynaip_jax.schema import D

T = TypeVar("T")
Main = Callable[[Sequence[str]], int | None]
AST_TRIES = 5
UNREAD = 128 + 13  # exit status where nobody reads on, as of a process that SIGPIPE ends
WIDTH = "100000"  # columns of what tyro complains of, so that it breaks no word


def argument(
    doc: str,
    *,
    default: Any = dataclasses.MISSING,
    usual: Any = None,
    unit: str = "",
    group: str = "",
    repeat: bool = False,
    positional: bool = False,
) -> Any:
    """A field of a command's arguments, which are a dataclass: what help says of it; required if it has no `default`.

    `usual`: what the default None stands for; `unit`: what a value is called; `group`: the heading in help; `repeat`: the flag
    takes one value and may be given several times, where a tuple takes several values at once; `positional`: it has no flag.
    """
    meta = dict(doc=doc, usual=usual, unit=unit, group=group, repeat=repeat, positional=positional)
    return dataclasses.field(default=default, kw_only=True, metadata=meta)


def parse(cls: type[D], argv: Sequence[str] | None, prog: str, examples: str = "") -> D:
    """The arguments in `argv`. Raises `UserError` for words that do not fit; --help prints and exits."""
    arguments, unknown = parse_known(cls, argv, prog, examples, others=False)
    assert not unknown
    return arguments


def parse_known(
    cls: type[D], argv: Sequence[str] | None, prog: str, examples: str = "", *, others: bool = True
) -> tuple[D, list[str]]:
    """The arguments in `argv`, and the words that are none of them (`others`: whether there may be any)."""
    from tyro import conf

    words = sys.argv[1:] if argv is None else list(argv)
    try:
        groups = run_tyro(
            _tyro_type(cls),
            words,
            see=prog,
            prog=prog,
            description=inspect.cleandoc(cls.__doc__ or ""),
            config=(conf.OmitArgPrefixes,),
            return_unknown_args=others,
        )
    except SystemExit:  # --help
        print(examples, end="")
        raise
    groups, unknown = groups if others else (groups, [])
    given = {name: value for group in groups.values() for name, value in group.items()}
    return _filled(cls, given, prog), unknown


def _filled(cls: type[D], given: dict[str, Any], prog: str) -> D:
    """The arguments that are given, and defaults. Raises `UserError` if there is none where one is the least."""
    for f in dataclasses.fields(cls):
        if f.default is False:
            given[f.name] = bool(given[f.name])  # tyro counts it
        elif given.get(f.name) == () and (f.default is dataclasses.MISSING or not f.metadata["repeat"]):
            raise UserError(f"`{f.name}`: no value given; expected at least one; see {prog} --help")
        _check_local(f.name, given.get(f.name))
    return cls(**given)


def _check_local(field: str, value: Any) -> None:
    """Raises `UserError` for a bucket where a `Path` is meant, which would become a local folder "gs:"."""
    for path in value if isinstance(value, tuple) else (value,):
        if isinstance(path, Path) and re.fullmatch(r"(gs|s3):", path.parts[0] if path.parts else ""):
            raise UserError(
                f"`{field}` {path.parts[0]}//{'/'.join(path.parts[1:])}: lies in a bucket; expected a path on a disk; copy from or to there"
            )


def run_tyro(kind: Any, words: Sequence[str], *, see: str, **options: Any) -> Any:
    """`tyro.cli(kind, args=words, **options)`; what it complains of is a `UserError` of one line that ends in "see SEE --help"."""
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), _wide_unless({"-h", "--help"} & set(words)):
            return _retried(lambda: tyro.cli(kind, args=words, **options))
    except SystemExit as e:
        if not e.code:
            raise
        raise UserError(f"{_one_line(complaint.getvalue())}; see {see} --help") from e


def _retried(call: Callable[[], T]) -> T:
    """`call()`, again if another thread compiled Python code at the same moment: tyro reads sources, and CPython 3.11 counts the
    depth of its parsers of all threads together and then raises SystemError ("AST constructor recursion depth mismatch")."""
    for _ in range(AST_TRIES - 1):
        try:
            return call()
        except SystemError as e:
            if "recursion depth mismatch" not in str(e):
                raise
    return call()


@contextlib.contextmanager
def _wide_unless(narrow: object) -> Iterator[None]:
    """A terminal of many columns, for what is not shown as it is laid out."""
    before = os.environ.get("COLUMNS")
    if not narrow:
        os.environ["COLUMNS"] = WIDTH
    try:
        yield
    finally:
        if before is not None:
            os.environ["COLUMNS"] = before
        elif not narrow:
            del os.environ["COLUMNS"]


def _one_line(box: str) -> str:
    """The first paragraph of a box that tyro draws around a complaint: what stands between its title's rule and the next one."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│ ") for line in box.splitlines()]
    rules = [n for n, line in enumerate(lines) if re.match(r"[╭╰─]|-{3,}$", line)] + [len(lines)] * 2
    text = " ".join(" ".join(lines[rules[0] + 1 : rules[1]]).split()).rstrip(".")
    if unknown := re.fullmatch(r"Unrecognized options: (.*)", text):
        return f"unrecognized arguments: {unknown[1].replace(',', '')}"
    choice = re.fullmatch(r"invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*)\)", text)
    if choice is None:
        return text
    value, option, allowed = choice.groups()
    return re.sub(r"'(\d+)'", r"\1", f"{option}: invalid choice: '{value}' (choose from {allowed.rstrip(',')})")


def _tyro_type(cls: type) -> type:
    """`cls` as tyro reads it: a dictionary of those arguments that are given, in another dictionary for each group.

    Each has its help beside it, so that tyro does not look for comments in source files.
    """
    from tyro import conf

    hints = get_type_hints(cls)  # types made here, at run time, are nothing that mypy can follow: hence `type: ignore`
    groups: dict[str, dict[str, Any]] = {}
    for f in dataclasses.fields(cls):
        hint, meta = _without_none(hints[f.name]), f.metadata
        required = f.default is dataclasses.MISSING
        marks: list[Any] = [
            conf.arg(
                help=meta["doc"],
                metavar=None if get_origin(hint) is Literal else meta["unit"] or None,
                help_behavior_hint="(required)" if required else _default_hint(f.default, meta["usual"]),
            )
        ]
        if meta["repeat"]:
            marks.append(conf.UseAppendAction)
        if meta["positional"]:
            marks.append(conf.Positional)
        if f.default is False:  # a flag without a --no- twin: tyro counts it
            hint, marks = int, [*marks, conf.UseCounterAction]
        annotated: Any = Annotated[(hint, *marks)]
        always = required or meta["repeat"] or f.default is False  # tyro gives a value: (), 0 if there is none
        groups.setdefault(meta["group"], {})[f.name] = Required[annotated] if always else annotated
    # type checkers want a class statement; these are made of fields that are known only when it runs
    made = {
        name or "arguments": Annotated[TypedDict(name, fields, total=False), conf.arg(name=name, help="")]  # type: ignore[operator]
        for name, fields in groups.items()
    }
    return TypedDict(cls.__name__, made)  # type: ignore[operator]  # made when it runs, as those above


def _without_none(hint: Any) -> Any:
    """`X` of `X | None`."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(hint) and len(kinds) == 1 else hint


def _default_hint(default: Any, usual: Any) -> str:
    """What help says of a default; nothing where there is nothing to say."""
    shown = usual if default is None else default
    if shown is None or shown is False or shown == ():
        return ""
    return f"(default: {' '.join(map(str, shown)) if isinstance(shown, tuple) else shown})"


class Command(NamedTuple):
    """One of several that a word chooses: its function, a line of help, and options whose flag is not `flag(option)`."""

    main: Main
    doc: str
    flags: Mapping[str, str] = {}


def choose(prog: str, doc: str, commands: Mapping[str, Command], argv: Sequence[str], examples: str = "") -> int:
    """Runs the command that `argv` begins with. Raises `UserError` if there is no such."""
    name, *rest = argv or [""]
    if name in ("-h", "--help"):
        width = max(map(len, commands))
        lines = "\n".join(f"  {word:{width}}  {command.doc}" for word, command in commands.items())
        print(f"usage: {prog} [--help] COMMAND ...\n\n{doc}\n\ncommands:\n{lines}")
        print(f"\n{prog} COMMAND --help says more.\n{examples}", end="")
        return 0
    if name not in commands:
        given = f"{name}: no such command" if name else "no command given"
        raise UserError(f"{given}; expected one of {', '.join(commands)}; see {prog} --help")
    return run_cli(commands[name].main, rest, commands[name].flags)


def flag(field: str) -> str:
    """The flag of an option: "true_cfg" -> "--true-cfg", "data.clip_size" -> "--data.clip-size"."""
    return f"--{field.replace('_', '-')}"


def unforeseen(error: Exception) -> UserError:
    """What to tell of an `OSError`, `MemoryError` or `RecursionError` that no reader or writer made words of."""
    if isinstance(error, MemoryError):
        return UserError(
            f"memory: {reason(error)}; there is not enough for this; expected more free memory; ask for less, or close other programs"
        )
    if isinstance(error, RecursionError):
        return UserError(
            "input: nested too deep to be read; expected files as programs write them; check the one given"
        )
    name = getattr(error, "filename", None)
    where = "the system" if name is None else name
    return UserError(
        f"{where}: {reason(error)}; expected files and folders that can be read and written; check the path and its rights"
    )


def _nobody_reads() -> bool:
    """Whether the reader of stdout has left, as `head` does. Nothing is written to it any more, also not by Python at its end."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    left = any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))
    if left:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return left


def _ignore_unawaited() -> None:
    """What Orbax had not begun when a write of it failed, Python would warn of, after the error has been told. For the whole process, which is
    the command's own."""
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def run_cli(main: Main, argv: Sequence[str] | None = None, flags: Mapping[str, str] | None = None) -> int:
    """Runs `main` with the words of the command line; a `UserError`, and what the system refuses, becomes one line on stderr and status
    2, Ctrl-C status 130 and SIGTERM 143, with what is lost by it on one line; that nobody reads on is status 141, without a word.

    `flags`: options whose flag is not `flag(option)`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    leave_absent_tpus()
    _ignore_unawaited()
    try:
        with interrupts.handled():
            status = main(sys.argv[1:] if argv is None else argv) or 0
            sys.stdout.flush()
            return status
    except (UserError, OSError, MemoryError, RecursionError) as e:
        if isinstance(e, BrokenPipeError) and _nobody_reads():
            return UNREAD
        error = e if isinstance(e, UserError) else unforeseen(e)
        print(f"error: {error.told(lambda field: (flags or {}).get(field) or flag(field))}", file=sys.stderr)
        return 2
    except interrupts.Interrupted as e:
        print(e, file=sys.stderr)
        interrupts.leave(e.number)
        return 128 + e.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
