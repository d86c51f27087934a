"""`dynaip evaluate`: how well an adapter keeps subjects and prompts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dynaip_jax.app import evaluate_set
from dynaip_jax.commandline import Command, argument, choose, parse
from dynaip_jax.errors import UserError
from dynaip_jax.tasks import task

EXAMPLES = """
examples:
  dynaip evaluate shapeland --rows default dds-off text-only --subjects 1
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
    opened = open_model(model, adapter)
    subjects: list[int] = sorted(set(args.subjects))
    measure.check(opened.model, names, subjects)
    judge = read_judge(args.judge or default.JUDGE)
    with task(f"loading {model}"):
        pipe = DynaIPPipeline.read(opened)
    with task("calibrating the judge"):
        calibrations = {s: scoring.calibrate(judge, s) for s in subjects}
    rows = measure.evaluate(pipe, judge, names, subjects, args.seed, args.num, progress=True, calibrations=calibrations)
    rows += [row for row in stored if row["subjects"] in subjects]
    for doubt in scoring.doubts(calibrations):
        print(f"warning: {doubt}", file=sys.stderr)
    if args.json:
        import json

        judged = {s: calibration._asdict() for s, calibration in calibrations.items()}
        print(json.dumps(dict(rows=rows, seed=args.seed, num=args.num, model=str(model), judge=judged), indent=1))
        return 0
    print(f"The judge on true renders:\n\n{scoring.judge_table(calibrations)}\n\n{measure.table(rows)}")
    return 0


FLAGS = dict(bundle="--model")
WORLDS = dict(
    shapeland=Command(shapeland, "drawn scenes of which everything is known", FLAGS),
    set=Command(evaluate_set.main, "DreamBench, DreamBench++, or a set of your own", FLAGS | dict(set="SET")),
)
