"""Seeded damage to files: bytes that flip, go, come or are cut off; and values of JSON that are others, of other types, huge or deep."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**31, 2**63, 2**64, 10**9, 10**400, -(2**40), 0.0, -0.5, 1e-300, 1e38, 1e308, 1.5)
TEXTS = (
    "",
    " ",
    "\0",
    "x" * 300,
    "../../etc/passwd",
    "/dev/zero",
    "\x1b[2J\x1b]0;owned\x07",
    "\u202etxt.exe",
    "äöü",
    "nan",
    "None",
)
VALUES = (*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], [1, 2, 3], {"a": {}}, [None] * 5, ["x"])
RAW = (  # that no JSON value is
    "NaN", "-Infinity", "1e999", "[" * 100_000, '{"a":' * 50_000, '"\\ud800"', "01", "tru", "'x'", '{"a": 1, "a": 2}', "9" * 5000,
)  # fmt: skip
MARK = "@@raw@@"


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """`data` with one to three faults, most of them near its head, where formats keep what they say of themselves."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        size = len(out)
        near = rng.randrange(max(1, min(size, rng.choice((8, 64, 512, size or 1)))))
        kind = rng.randrange(9)
        if kind == 0 and size:
            out[near] ^= 1 << rng.randrange(8)
        elif kind == 1 and size:
            out[near] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x7B, rng.randrange(256)))
        elif kind == 2:
            del out[near : near + rng.choice((1, 2, 8, 100))]
        elif kind == 3:
            out[near:near] = rng.randbytes(rng.choice((1, 2, 8, 100)))
        elif kind == 4:
            del out[rng.randrange(size + 1) :]
        elif kind == 5:
            out += rng.choice((b"\0", b" ", b"\n", rng.randbytes(9), bytes(out[:20])))
        elif kind == 6 and size >= 8:
            at = near if near + 8 <= size else 0
            value = rng.choice((0, 1, 2**16, 2**31, 2**32 - 1, 2**62, 2**63, size, size + 1, rng.randrange(2**64)))
            out[at : at + 8] = struct.pack("<Q", value)
        elif kind == 7 and size:
            length = rng.choice((1, 4, 16, 64))
            a, b = rng.randrange(size), rng.randrange(size)
            out[a : a + length] = out[b : b + length]
        elif kind == 8 and size:
            a = rng.randrange(size)
            out[a:a] = out[a : a + rng.choice((1, 4, 16, 64))]
    return bytes(out)


def damaged_json(rng: random.Random, data: bytes, own: tuple[Any, ...] = ()) -> bytes:
    """The JSON `data` with one or two values, names or entries changed; sometimes as text, past what JSON allows. `own`: more values
    that a format may be hurt by."""
    if rng.random() < 0.15:
        return damaged_bytes(rng, data)
    value = copy.deepcopy(json.loads(data))
    raw = None
    for _ in range(rng.choice((1, 1, 1, 2))):
        parents = _containers(value)
        if not parents:
            break
        parent = rng.choice(parents)
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        kind = rng.randrange(7)
        if not keys or kind == 0:
            new = copy.deepcopy(rng.choice((*VALUES, *own)))
            if isinstance(parent, dict):
                parent[rng.choice((*TEXTS, *map(str, keys), "__class__"))] = new
            else:
                parent.append(new)
            continue
        key = rng.choice(keys)
        if kind == 1:
            del parent[key]
        elif kind == 2 and isinstance(parent, dict):
            parent[rng.choice((*TEXTS, str(key).upper(), f"{key}x", *map(str, keys)))] = parent.pop(key)
        elif kind == 3:
            parent[key], raw = MARK, rng.choice(RAW)
        elif kind == 4 and isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
            parent[key] = rng.choice(
                (parent[key] + 1, parent[key] - 1, -parent[key], parent[key] * 1000, str(parent[key]), [parent[key]])
            )
        else:
            parent[key] = copy.deepcopy(rng.choice((*VALUES, *own)))
    text = json.dumps(value)
    if raw is None and rng.random() < 0.08 and isinstance(value, dict) and value:
        name = rng.choice(list(value))
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(rng.choice(VALUES))}" + "}"  # a name twice
    return text.replace(json.dumps(MARK), raw or "null").encode()


def _containers(value: Any) -> list[Any]:
    found, level = [], [value]
    while level:
        here = [x for x in level if isinstance(x, dict | list)]
        found += here
        level = [y for x in here for y in (x.values() if isinstance(x, dict) else x)]
    return found
