"""`dynaip evaluate`: how well an adapter keeps subjects and prompts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dynaip_jax.app import evaluate_set
from dynaip_jax.commandline import Command, argument, choose, parse
from dynaip_jax.errors import UserError
from dynaip_jax.tasks import task

if TYPE_CHECKING:
    from dynaip_jax.eval.tables import Difference, Row
    from dynaip_jax.shapeland.scoring import Calibration

EXAMPLES = """
examples:
  dynaip evaluate shapeland --rows default text-only --against dds-off --subjects 1
      what Dynamic Decoupling changes, and what the base does without references
  dynaip evaluate shapeland --adapter adapters/mine --num 64 --json > mine.json
      all rows of an adapter of your own, on a quarter of the cases
"""
SEEDS = 2**32
MOST = 1_000_000  # cases a row


@dataclass(frozen=True)
class Arguments:
    """CP (is it the same subject?), PF (is it what the prompt says?) and CP·PF on identities and scenes that nobody was trained on,
    for the default settings and their alternatives, with 95 % intervals."""

    model: str | None = argument(
        "a base model of Shapeland, from python -m train.shapeland",
        default=None,
        usual="the embedded one",
        unit="BUNDLE",
    )
    adapter: str | None = argument(
        "an adapter for it", default=None, usual="the embedded one, if --model is left out", unit="DIR"
    )
    judge: Path | None = argument("the judge's weights", default=None, usual="the embedded ones", unit="FILE")
    rows: tuple[str, ...] | None = argument(
        "only these rows (a wrong name lists them all)", default=None, unit="NAME [NAME ...]"
    )
    subjects: tuple[Literal[1, 2, 3], ...] = argument("how many a picture has", default=(1, 2, 3), unit="S [S ...]")
    num: int = argument("cases a row", default=256, unit="N")
    seed: int = argument("of cases and noise", default=0, unit="N")
    against: tuple[str, ...] | None = argument(
        "also how much each row differs from this one, case by case, with 95 % intervals",
        default=None,
        unit="ROW [ROW ...]",
    )
    json: bool = argument("print JSON instead of a table", default=False)


def main(argv: Sequence[str]) -> int:
    """Chooses the world to measure in."""
    return choose("dynaip evaluate", "Measures an adapter.", WORLDS, argv)


def shapeland(argv: Sequence[str]) -> int:
    """`dynaip evaluate shapeland`: prints a table, or JSON."""
    args = parse(Arguments, argv, "dynaip evaluate shapeland", EXAMPLES)
    if not 1 <= args.num <= MOST:
        raise UserError(f"`num` {args.num}: expected at least 1, and at most {MOST}")
    if not 0 <= args.seed < SEEDS:
        raise UserError(f"`seed` {args.seed}: expected a number from 0 to {SEEDS - 1}")

    from dynaip_jax.sampling.opening import open_model
    from dynaip_jax.sampling.pipeline import DynaIPPipeline
    from dynaip_jax.shapeland import default, measure, scoring
    from dynaip_jax.shapeland.judge import read_judge

    model: str | Path | None = args.model
    adapter: str | Path | None = args.adapter
    stored = []
    if model is None:
        model, embedded = default.paths()
        stored = [] if adapter else measure.retrained()
        adapter = adapter or embedded
    names = args.rows
    if names is not None:
        stored = [row for row in stored if row["name"] in names]
        names = tuple(name for name in names if name not in {row["name"] for row in stored})
    against = args.against or ()
    if names is not None:
        names = tuple(dict.fromkeys((*names, *against)))
    opened = open_model(model, adapter)
    subjects: list[int] = sorted(set(args.subjects))
    checked = measure.check(opened.model, names, subjects)
    if missing := set(against) - set(checked):
        raise UserError(f"`against` {min(missing)}: no such row; expected some of {', '.join(checked)}")
    judge = read_judge(args.judge or default.JUDGE)
    with task(f"loading {model}"):
        pipe = DynaIPPipeline.read(opened)
    with task("calibrating the judge"):
        calibrations = {s: scoring.calibrate(judge, s) for s in subjects}
    measured = measure.evaluate(
        pipe, judge, names, subjects, args.seed, args.num, progress=True, calibrations=calibrations
    )
    rows = [m.row for m in measured] + [row for row in stored if row["subjects"] in subjects]
    differences = [difference for row in against for difference in measure.differences(measured, row)]
    for doubt in scoring.doubts(calibrations):
        print(f"warning: {doubt}", file=sys.stderr)
    if args.json:
        import json

        found: dict[str, Any] = dict(rows=rows, seed=args.seed, num=args.num, model=str(model))
        found |= dict(judge={s: calibration._asdict() for s, calibration in calibrations.items()})
        print(json.dumps(found | (dict(against=differences) if differences else {}), indent=1))
        return 0
    print(_report(rows, differences, calibrations))
    return 0


def _report(rows: list[Row], differences: list[Difference], calibrations: dict[int, Calibration]) -> str:
    """All tables as text."""
    from dynaip_jax.eval import tables
    from dynaip_jax.shapeland import measure, scoring

    parts = {
        "The judge on true renders:": scoring.judge_table(calibrations),
        "CP and PF:": measure.table(rows),
        "Parts of CP and PF, and leaks:": tables.parts_table(rows),
    }
    if differences:
        parts["Differences, case by case:"] = tables.differences_table(differences)
    return "\n\n".join(f"{title}\n\n{table}" for title, table in parts.items())


FLAGS = dict(bundle="--model")
WORLDS = dict(
    shapeland=Command(shapeland, "drawn scenes of which everything is known", FLAGS),
    set=Command(evaluate_set.main, "DreamBench, DreamBench++, or a set of your own", FLAGS | dict(set="SET")),
)
