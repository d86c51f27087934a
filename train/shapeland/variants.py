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
from dynaip_jax.shapeland.measure import Measured, difference, evaluate
from dynaip_jax.storage.renames import write_new
from dynaip_jax.storage.tensors import read_tree
from train.export import export
from train.shapeland.configs import ADAPTER, with_steps
from train.shapeland.runs import run
from train.shapeland.workdir import SHIPPED, WEIGHTS
from train.shapeland.world import PAIRS, write_records

STEPS = 800
THREE = {"same": 0.5, "shared": 0.25, "other": 0.25}
DEFAULT = "default"  # the variant that all others are compared with


class Variant(NamedTuple):
    """`asks`: the question it answers; `changes`: fields of `AdapterChoices` that differ; `data`: arguments of `pair_record` that differ."""

    asks: str
    changes: dict[str, Any] = {}
    data: dict[str, Any] = {}


VARIANTS = {
    DEFAULT: Variant("the defaults, trained as briefly as the variants"),
    "low level": Variant("no HMoE: CLIP's low layer alone", dict(weights=(1.0, 0.0, 0.0))),
    "middle level": Variant("no HMoE: CLIP's middle layer alone", dict(weights=(0.0, 1.0, 0.0))),
    "last layer": Variant("no HMoE: CLIP's last layer alone", dict(weights=(0.0, 0.0, 1.0))),
    "equal weights": Variant("no router: all levels alike", dict(weights=(1.0, 1.0, 1.0))),
    "double blocks": Variant("no injection into the single blocks", dict(blocks="double")),
    "query after RoPE": Variant("the query of the reference term with its position", dict(query="after_rope")),
    "three kinds": Variant("references of all three kinds", data=dict(references=THREE)),
    "other pictures": Variant("no reference shows the target's own setting", data=dict(references={"other": 1.0})),
    "all is said": Variant("captions leave nothing open", data=dict(unsaid=0.0)),
}


def train_variants(folder: Path, seed: int) -> None:
    """Trains and measures each of `VARIANTS`; the rows, and how much each is above the default one, go into the package."""
    for name, variant in VARIANTS.items():
        if not (folder / name / "adapter").exists():
            print(f"variant {name}", file=sys.stderr)
            _train(folder, seed, name, variant)
    measured = {name: _measure(folder, seed, name) for name in VARIANTS}
    rows = [_row(m, name, seed) for name, each in measured.items() for m in each]
    bases = {m.subjects: m.scores for m in measured[DEFAULT] if m.name == "default"}
    against = [
        difference(m._replace(name=_title(name)), _title(DEFAULT), bases[m.subjects])
        for name, each in measured.items()
        for m in each
        if name != DEFAULT and m.name == "default"
    ]
    write_new(default.RETRAINED, (json.dumps(dict(rows=rows, against=against), indent=1) + "\n").encode())


def _train(folder: Path, seed: int, name: str, variant: Variant) -> None:
    root = folder.parent
    choices = dataclasses.replace(ADAPTER.adapter, **variant.changes)
    config = with_steps(dataclasses.replace(ADAPTER, adapter=choices), STEPS)
    records, features = root / "world" / "pairs", root / "adapter" / "features"
    if variant.data:
        records, features = folder / name / "pairs", folder / name / "features"
        if not records.exists():
            write_records(records, partial(pair_record, seed, **variant.data), PAIRS)
    done = run(config, folder / name, seed, root / "base" / "bundle", records, features)
    export(done, folder / name / "adapter", None, dtype=SHIPPED, overwrite=True)


def _measure(folder: Path, seed: int, name: str) -> list[Measured]:
    """Rows with DDS on and off."""
    root = folder.parent
    judge = read_tree(root / "judge" / WEIGHTS)
    pipe = DynaIPPipeline.load(root / "base" / "bundle", folder / name / "adapter")
    return evaluate(pipe, judge, ["default", "dds-off"], seed=seed)


def _row(measured: Measured, name: str, seed: int) -> dict[str, Any]:
    dds = "" if measured.name == "default" else f", {measured.name}"
    return {**measured.row, "name": _title(name) + dds, "asks": VARIANTS[name].asks, "seed": seed, "steps": STEPS}


def _title(name: str) -> str:
    return f"retrained: {name}"
