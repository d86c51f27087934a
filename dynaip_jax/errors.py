"""The one error a user is meant to read, and the command-line frame that shows it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


class UserError(Exception):
    """Bad input. The message is one line: the file or option, what was found, what was expected, the remedy.

    Command-line programs print it to stderr and exit with status 2 (`run_cli`); the library raises it.
    """


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run_cli(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs `main(argv)`; a `UserError` becomes one line on stderr and status 2, Ctrl-C status 130."""
    try:
        return main(argv) or 0
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
