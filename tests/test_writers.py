"""A plain folder's writer against kills, a second writer, files that may not grow and a closed folder; `tests.writers` has all of them."""

import random

from tests import writers
from tests.writers import Faults


def test_a_folder_against_every_fault(tmp_path):
    writers.CONTEXT.set_forkserver_preload(["dynaip_jax.commandline", "dynaip_jax.storage.folders"])
    (tmp_path / "sources").mkdir()
    (tmp_path / "place").mkdir()
    faults = Faults("folder", tmp_path / "sources", tmp_path / "place", mount=False)
    faults.kills(4, random.Random(0))
    for fault in (faults.two, faults.second_while_one_writes, faults.full, faults.read_only):
        fault()
    assert faults.wrong == []
