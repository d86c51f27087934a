"""The one error a user is meant to read."""

from __future__ import annotations

import re
from collections.abc import Callable

FIELD = re.compile(r"`([a-z][\w.]*)`")


class UserError(Exception):
    """Bad input. The message is one line: the option or file, what was found, what was expected, the remedy.

    Options are named as Python has them, in backticks: "`steps` 0: expected at least 1". A command turns them into its flags, a
    page into its labels (`told`).
    """

    @property
    def field(self) -> str | None:
        """The option that the message names first; None if it names none."""
        match = FIELD.search(str(self))
        return match[1] if match else None

    def told(self, name: Callable[[str], str]) -> str:
        """The message on one line, with `name(option)` in place of each option in backticks."""
        return " ".join(FIELD.sub(lambda match: name(match[1]), str(self)).split())
