"""Messages: one line, short, and nothing that a terminal would obey."""

import pickle

from dynaip_jax.errors import LONGEST, UserError, printable, reason


def test_what_a_name_holds_does_not_reach_the_terminal():
    error = UserError("a\x1b[2J\x1b]0;owned\x07.png: no\nsuch\tfile \u202egnp.exe \ud800; check `out`")
    assert str(error) == "a\\x1b[2J\\x1b]0;owned\\x07.png: no such file \\u202egnp.exe \\ud800; check `out`"
    assert error.told(lambda name: f"--{name}").endswith("check --out") and error.field == "out"
    assert printable("grün 猫") == "grün 猫"


def test_long_messages_keep_their_ends():
    error = UserError(f"`out` {'long/' * 200}x.png: cannot be written; choose another name")
    for text in (str(error), error.told(lambda name: "--a-longer-name")):
        assert (
            len(text) <= LONGEST and text.endswith("x.png: cannot be written; choose another name") and " ... " in text
        )
    assert str(error).startswith("`out` long/") and str(pickle.loads(pickle.dumps(error))) == str(error)


def test_reasons_are_the_first_line_or_the_kind():
    assert reason(ValueError("first\nsecond")) == "first" and reason(KeyError()) == "KeyError"
    assert reason(OSError(28, "No space left on device", "/tmp/x")) == "No space left on device"
    assert len(reason(ValueError("x" * 999))) == 120
