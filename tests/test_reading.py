"""JSON of others, and questions to the file system."""

import json
import os
from pathlib import Path

import pytest

from dynaip_jax import reading
from dynaip_jax.errors import UserError


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "a": 1}', "the name 'a' stands twice"),
        (b"[" * 33 + b"]" * 33, "nested more than 32 deep"),
        (b"[" * 10**6, "nested more than 32 deep"),
        (b'{"a":' * 10**5, "nested more than 32 deep"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (rb'{"a": ["\ud83d"]}', "half a character"),
        (rb'{"\ud83d": 1}', "half a character"),
        (b"\xff\xfe{}", "codec can't decode"),
        (b"9" * 5000, "limit"),
        (b"{} {}", "Extra data"),
        (b" " * 101, "101 bytes, at most 100 are read"),
    ],
)
def test_json_is_strict(data, message):
    with pytest.raises(ValueError, match=message):
        reading.parse_json(data, 100 if message.startswith("101") else reading.JSON_BYTES)


def test_json_that_is_read():
    assert reading.parse_json(b"[" * 32 + b"]" * 32) is not None
    assert reading.parse_json(rb'"\ud83d\ude00"') == "\N{GRINNING FACE}"
    assert reading.parse_json(rb'"\ud83d"', halves=True) == "\ud83d"
    assert reading.parse_json(b'\xef\xbb\xbf{"a": 1.5}') == dict(a=1.5)


def read(path):
    return reading.read_json(path, expected="a config", remedy="download it again")


def test_files_that_are_no_json_objects(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(UserError, match="a.json: missing; expected a config; download it again"):
        read(file)
    for content, message in (("[]", "a JSON list, not an object"), ("{", "Expecting"), ("[" * 9999, "nested")):
        file.write_text(content)
        with pytest.raises(UserError, match=f"a.json: not readable as JSON .{message}.*; expected a config; download"):
            read(file)
    with open(file, "wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(UserError, match="more than 16777216 bytes"):
        read(file)
    with pytest.raises(UserError, match="a folder"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # reading it would never end
    with pytest.raises(UserError, match="no plain file"):
        read(tmp_path / "pipe")
    file.write_text(json.dumps(dict(a=1)))
    assert read(file) == dict(a=1)


def test_questions_that_the_system_does_not_answer(tmp_path, monkeypatch):
    for ask in (reading.is_file, reading.is_dir, reading.exists):
        assert ask(tmp_path) is (ask is not reading.is_file)
        with pytest.raises(UserError, match="cannot be looked at .File name too long.; check the path"):
            ask(tmp_path / ("x" * 300))

    def closed(self, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", closed)
    with pytest.raises(UserError, match="cannot be looked at .Permission denied."):
        reading.is_file(tmp_path / "closed" / "x")
