"""A process that reads mutants: `python -m tests.mutation.worker READER SEED FOLDER`, then a number a line on stdin, a verdict a line.

A reader may kill it or never come back; `tests.mutation.run` notices both and starts another.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import tempfile
import unicodedata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import flax.linen  # noqa: E402, F401  (slow to import: not while a mutant's time runs)

from dynaip_jax.errors import LONGEST, UserError  # noqa: E402
from tests.mutation.readers import READERS, Reader  # noqa: E402

MEMORY = 24 * 2**30  # of addresses: what asks for more gets a MemoryError


def judged(reader: Reader, good: Path, original: object, rng: random.Random, place: Path) -> tuple[str, str]:
    """The verdict on one mutant, and what is to be said of it."""
    reader.mutate(rng, good, place)
    try:
        found = reader.read(place)
    except UserError as e:
        return _message(e.told(lambda name: f"--{name}"))
    except BaseException as e:
        return "foreign", f"{type(e).__name__}: {str(e)[:300]}"
    if found == original:
        return "same", ""
    try:
        complaint = reader.different(place, found)
    except Exception as e:  # what the reader took, nobody else can read
        complaint = f"{type(e).__name__}: {e}"
    return ("different", complaint) if complaint else ("other", "")


def _message(text: str) -> tuple[str, str]:
    bad = [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    return ("message", text) if bad or len(text) > LONGEST else ("refused", text)


def main() -> None:
    """Answers until stdin ends."""
    name, seed, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    noise = tempfile.TemporaryFile()
    os.dup2(noise.fileno(), 1)
    os.dup2(noise.fileno(), 2)
    reader, good, place = READERS[name](), folder / name, folder / f"{name}-mutant"
    if not good.exists():
        good.mkdir()
        reader.make(good)
    original = reader.read(good)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(json.dumps(["ready", ""]), file=answers, flush=True)
    for line in sys.stdin:
        rng = random.Random(f"{name} {seed} {int(line)}")
        reader.place(good, place)
        before = noise.seek(0, 2)
        verdict, text = judged(reader, good, original, rng, place)
        sys.stderr.flush()
        noise.seek(before)
        said = noise.read().decode(errors="replace")
        if "Traceback" in said and verdict in ("refused", "same", "other"):
            verdict, text = "noise", said[-300:]
        print(json.dumps([verdict, text]), file=answers, flush=True)


if __name__ == "__main__":
    main()
