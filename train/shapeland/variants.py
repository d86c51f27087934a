"""Stage `variants`: adapters that differ in one choice, for the table."""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland import default
from dynaip_jax.shapeland.dataset import pair_record
from dynaip_jax.shapeland.measure import evaluate
from dynaip_jax.storage.renames import write_new
from dynaip_jax.storage.tensors import read_tree
from train.export import export
from train.shapeland.configs import ADAPTER, with_steps
from train.shapeland.runs import run
from train.shapeland.workdir import SHIPPED, WEIGHTS
from train.shapeland.world import PAIRS, write_records

STEPS = 800
SAME_PICTURE = "same picture"


class Variant(NamedTuple):
    """`asks`: the question it answers; `changes`: fields of `AdapterChoices` that differ."""

    asks: str
    changes: dict[str, Any]


VARIANTS = {
    "default": Variant("the defaults, trained as briefly as the variants", {}),
    "double blocks": Variant("no injection into the single blocks", dict(blocks="double")),
    "query after RoPE": Variant("the query of the reference term with its position", dict(query="after_rope")),
    "last layer": Variant("no HMoE: CLIP's last layer alone", dict(weights=(0.0, 0.0, 1.0))),
    "equal weights": Variant("no router: all levels alike", dict(weights=(1.0, 1.0, 1.0))),
    SAME_PICTURE: Variant("the reference is the target itself", {}),
}


def train_variants(folder: Path, seed: int) -> None:
    """Trains and measures each of `VARIANTS`; the rows go into the package."""
    for name, variant in VARIANTS.items():
        if not (folder / name / "adapter").exists():
            print(f"variant {name}", file=sys.stderr)
            _train(folder, seed, name, variant)
    rows = [row for name, variant in VARIANTS.items() for row in _measure(folder, seed, name, variant)]
    write_new(default.RETRAINED, (json.dumps(dict(rows=rows), indent=1) + "\n").encode())


def _train(folder: Path, seed: int, name: str, variant: Variant) -> None:
    root = folder.parent
    choices = dataclasses.replace(ADAPTER.adapter, **variant.changes)
    config = with_steps(dataclasses.replace(ADAPTER, adapter=choices), STEPS)
    records, features = root / "world" / "pairs", root / "adapter" / "features"
    if name == SAME_PICTURE:
        records, features = root / "world" / "same", folder / "features"
        if not records.exists():
            write_records(records, partial(pair_record, seed, reference="same"), PAIRS // 2)
    done = run(config, folder / name, seed, root / "base" / "bundle", records, features)
    export(done, folder / name / "adapter", None, dtype=SHIPPED, overwrite=True)


def _measure(folder: Path, seed: int, name: str, variant: Variant) -> list[dict[str, Any]]:
    """Rows with DDS on and off."""
    root = folder.parent
    judge = read_tree(root / "judge" / WEIGHTS)
    pipe = DynaIPPipeline.load(root / "base" / "bundle", folder / name / "adapter")
    rows = []
    for row in evaluate(pipe, judge, ["default", "dds-off"], seed=seed):
        dds = "" if row["name"] == "default" else f", {row['name']}"
        rows.append({**row, "name": f"retrained: {name}{dds}", "asks": variant.asks, "seed": seed, "steps": STEPS})
    return rows
