"""The one error a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one line: the file or option, what was found, what was expected, the remedy.

    Command-line programs print it to stderr and exit with status 2 (`run_cli`); the library raises it.
    """


def run_cli(main, argv=None) -> int:
    """Runs `main(argv)`; a `UserError` becomes one line on stderr and status 2, Ctrl-C status 130."""
    import sys

    try:
        return main(argv) or 0
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
