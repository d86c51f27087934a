"""The one error a user is meant to read, and that of too little memory."""

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


class OutOfMemory(MemoryError):
    """A device or the host has too little memory for what was asked; the message says how much, if that is known."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library is that of too little memory."""
    text = str(error)
    if "Error writing" in text:  # tensorstore's word for a full disk is RESOURCE_EXHAUSTED too
        return False
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
