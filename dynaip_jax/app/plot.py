"""`dynaip plot`: training curves of several runs in one figure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynaip_jax.app import figures
from dynaip_jax.commandline import argument, parse
from dynaip_jax.errors import UserError

EXAMPLES = """
examples:
  dynaip plot runs/one runs/two --smooth 20
      curves.png: loss, gradient norm, learning rate ... of both, and curves.csv, the values
  dynaip plot runs/one --metrics loss validation_loss routing_low --output loss.png
"""
MOST = 1_000_000
FLAGS = dict(runs="RUN")


@dataclass(frozen=True)
class Arguments:
    """Draws what training runs wrote into their metrics.jsonl, a plot a metric and a line a run, with the values beside it as CSV."""

    runs: tuple[str, ...] = argument("workdirs of runs, on a disk or gs://", unit="RUN", positional=True)
    metrics: tuple[str, ...] | None = argument(
        "what to plot (a wrong name lists them all)", default=None, usual="loss and the like", unit="NAME [NAME ...]"
    )
    smooth: int = argument("draw means of so many neighbouring values too", default=1, unit="N")
    output: Path = argument(
        "the figure; the values get the same name with .csv", default=Path("curves.png"), unit="OUT.png"
    )
    overwrite: bool = argument("replace existing files", default=False)


def main(argv: Sequence[str]) -> int:
    """Draws the figure; prints the names of the files."""
    args = parse(Arguments, argv, "dynaip plot", EXAMPLES)
    if not 1 <= args.smooth <= MOST:
        raise UserError(f"`smooth` {args.smooth}: expected at least 1, and at most {MOST}")
    figures.check(args.output, (".csv",), overwrite=args.overwrite)

    from dynaip_jax.eval import curves

    runs = {}
    for label, path in zip(curves.labels(args.runs), args.runs, strict=True):
        runs[label], damaged = curves.read_curves(path)
        if damaged:
            print(
                f"warning: {path}: {len(damaged)} lines of metrics cannot be read, the first is {damaged[0]}",
                file=sys.stderr,
            )
    names = curves.choose(runs, args.metrics)
    picture = curves.figure(runs, names, args.smooth)
    settings = dict(runs=list(args.runs), metrics=names, smooth=args.smooth)
    kept = figures.keep(picture, args.output, settings, overwrite=args.overwrite)
    figures.beside(kept, ".csv", curves.as_csv(runs, names).encode())
    return 0 if kept == args.output else 1
