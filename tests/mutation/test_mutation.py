"""A small share of the seeded mutation in `tests.mutation.run`: no mutant of a file is a crash, a hang, or read as something else.

The readers that load the least are all tried here; those that start networks are tried by the command that `run` documents.
"""

import collections
import json
import random

import pytest

from tests.mutation import mutants
from tests.mutation.readers import READERS
from tests.mutation.run import GOOD, run
from tests.mutation.worker import judged

QUICK = dict(
    safetensors=300, index=150, npy=200, msgpack=200, gguf=100, transformer_config=40, t5_config=30, clip_text_config=25, clip_vision_config=20,
    schedule=100, sources=150, features=60, old_features=40, bundle_json=20, adapter_json=15, loras=150, public_adapters=100,
    jobs=150, own_set=100, answers=100, scores=100,
)  # fmt: skip
# in a process of their own: they have hung, or died
GUARDED = dict(vae_config=25, pictures=20, bundle_folder=6, datasets=25)


@pytest.mark.parametrize("name", QUICK)
def test_no_mutant_is_a_crash(name, tmp_path):
    reader, good = READERS[name](), tmp_path / name
    good.mkdir()
    reader.make(good)
    original, verdicts = reader.read(good), collections.Counter()
    for number in range(QUICK[name]):
        place = reader.place(good, tmp_path / f"{name}-mutant")
        verdict, text = judged(reader, good, original, random.Random(f"{name} 1 {number}"), place)
        verdicts[verdict] += 1
        assert verdict in GOOD, f"mutant {number}: {verdict}: {text}"
    assert verdicts["same"] < 0.9 * QUICK[name]  # that the mutants are any


@pytest.mark.parametrize("name", GUARDED)
def test_no_mutant_hangs_or_kills(name):
    verdicts, faults = run(name, GUARDED[name], seed=1, limit=20)
    assert not faults and verdicts["refused"]


def test_a_mutant_is_the_same_whatever_was_made_before():
    """Values of one must not grow in the next."""
    data = json.dumps(dict(a=[1, {}], b={"c": []})).encode()

    def made():
        return [mutants.damaged_json(random.Random(seed), data) for seed in range(500)]

    assert made() == made()
