"""What ships in the package is small and says how it was made."""

import json

from dynaip_jax.shapeland import default
from train.shapeland.stages import KEPT, STAGES


def test_assets_are_small_and_say_how_they_were_made():
    size = sum(file.stat().st_size for file in default.ASSETS.rglob("*") if file.is_file())
    assert size < 25 * 2**20
    made = json.loads((default.ASSETS / "made.json").read_text())
    while "--go-on" in made["command"]:
        assert {stage["stage"] for stage in made["stages"]} <= {*KEPT, "text"}
        assert made["command"].startswith("python -m train.shapeland") and "jax" in made["versions"]
        made = made["before"]
    assert [stage["stage"] for stage in made["stages"]] == list(STAGES)[:-1]  # all but the one that wrote this
