"""Stage `ship`: into the package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dynaip_jax.shapeland import default
from dynaip_jax.storage.folders import replacing
from train.shapeland.workdir import DONE, WEIGHTS

MADE = "made.json"


def ship(folder: Path, seed: int, stages: Sequence[str]) -> None:
    """Copies what was trained into the package, with a note of how it was made. `stages`: those that the note tells of. Rows of adapters that
    were trained differently go: stage `variants` makes them for these models."""
    root = folder.parent
    notes = [json.loads((root / name / DONE).read_text()) for name in stages if (root / name / DONE).is_file()]
    made: dict[str, Any] = dict(command=f"python -m train.shapeland --workdir DIR --seed {seed}", stages=notes)
    if not (root / "vae").exists():  # started from the models in the package
        made["command"] += f" --go-on --stages {' '.join(note['stage'] for note in notes)}"
        made["before"] = json.loads((default.ASSETS / MADE).read_text())
    made["versions"] = {name: version(name) for name in ("dynaip_jax", "jax", "flax", "optax", "numpy")}
    with replacing(default.ASSETS, overwrite=True, marks=(MADE,)) as work:
        shutil.copytree(root / "base" / "bundle", work / "bundle")
        shutil.copytree(root / "adapter" / "adapter", work / "adapter")
        shutil.copy(root / "judge" / WEIGHTS, work / default.JUDGE.name)
        (work / MADE).write_text(json.dumps(made, indent=2) + "\n")
