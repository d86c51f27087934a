"""What every command shares: its frame, and how errors name options there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from dynaip_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def flag(field: str) -> str:
    """The flag of an option: "true_cfg" -> "--true-cfg", "data.clip_size" -> "--data.clip-size"."""
    return f"--{field.replace('_', '-')}"


def run_cli(
    main: Callable[[Sequence[str] | None], int | None],
    argv: Sequence[str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> int:
    """Runs `main(argv)`; a `UserError` becomes one line on stderr and status 2, Ctrl-C status 130.

    `flags`: options whose flag is not `flag(option)`.
    """
    try:
        return main(argv) or 0
    except UserError as e:
        print(f"error: {e.told(lambda field: (flags or {}).get(field) or flag(field))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
