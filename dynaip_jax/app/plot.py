"""`dynaip plot`: training curves of several runs in one figure."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynaip_jax.commandline import argument, parse
from dynaip_jax.errors import UserError, reason

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
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib is missing; expected it for figures; pip install 'dynaip_jax[plot]'")

    from dynaip_jax import images
    from dynaip_jax.eval import curves
    from dynaip_jax.storage.renames import write_new

    images.check_png_path(args.output, overwrite=args.overwrite)
    table = args.output.with_suffix(".csv")
    if os.path.lexists(table) and not args.overwrite:
        raise UserError(f"{table}: exists; expected a free name for the values; pass --overwrite, or another --output")
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
    kept = images.keep_png(
        picture, args.output, dict(runs=list(args.runs), metrics=names, smooth=args.smooth), overwrite=args.overwrite
    )
    if kept.reason is not None:
        print(f"warning: {args.output}: cannot be written ({kept.reason}); saved as {kept.path}", file=sys.stderr)
    print(kept.path)
    table = kept.path.with_suffix(".csv")
    try:
        write_new(table, curves.as_csv(runs, names).encode())
    except OSError as e:
        raise UserError(
            f"{table}: cannot be written ({reason(e)}); the figure is there, the values are not; free space and draw it again"
        ) from e
    print(table)
    return 0 if kept.reason is None else 1
