"""The one error a user is meant to read, and that of too little memory."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

FIELD = re.compile(r"`([a-z][\w.]*)`")
LONGEST = 300  # characters of a message
TAIL = 130  # of them for its end, where the remedy stands, if the middle is left out
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # Unicode's categories of what a terminal obeys or cannot show


def printable(text: object) -> str:
    """`text` on one line, what a terminal would obey or could not show (escape sequences, marks of direction, lone surrogates)
    written out as in Python."""
    line = " ".join(str(text).split())
    if line.isascii() and line.isprintable():
        return line
    shown = (c.encode("unicode_escape").decode() if unicodedata.category(c) in HIDDEN else c for c in line)
    return "".join(shown)


def shortened(text: str, most: int = LONGEST) -> str:
    """`text`, its middle left out if it has more than `most` characters."""
    if len(text) <= most:
        return text
    tail = most * TAIL // LONGEST
    return f"{text[: most - tail - 5]} ... {text[-tail:]}"


def reason(error: BaseException | str, most: int = 120) -> str:
    """Why something failed, in at most `most` characters: the first line of what a library says, else the kind of its error."""
    lines = str(error).strip().splitlines()
    strerror = getattr(error, "strerror", None)
    return shortened(printable(strerror or (lines[0] if lines else type(error).__name__)), most)


class UserError(Exception):
    """Bad input. The message is one line of at most 300 characters: the option or file, what was found, what was expected, the remedy.

    Options are named as Python has them, in backticks: "`steps` 0: expected at least 1". A command turns them into its flags, a
    page into its labels (`told`). Control characters, which a name in a file may hold, are written out.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))

    def __str__(self) -> str:
        return shortened(self.args[0])

    @property
    def field(self) -> str | None:
        """The option that the message names first; None if it names none."""
        match = FIELD.search(self.args[0])
        return match[1] if match else None

    def told(self, name: Callable[[str], str]) -> str:
        """The message on one line, with `name(option)` in place of each option in backticks."""
        return shortened(FIELD.sub(lambda match: name(match[1]), self.args[0]))


class OutOfMemory(MemoryError):
    """A device or the host has too little memory for what was asked; the message says how much, if that is known."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library is that of too little memory."""
    text = str(error)
    if "Error writing" in text:  # tensorstore's word for a full disk is RESOURCE_EXHAUSTED too
        return False
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
