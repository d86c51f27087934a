"""Trains an adapter (or a base).

python -m train.main --config configs/debug.py --workdir runs/debug
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynaip_jax.commandline import argument, parse_known, run_cli
from dynaip_jax.errors import UserError
from dynaip_jax.runtime.compiling import keep_compiled
from dynaip_jax.storage.folders import as_path
from train import config as config_
from train.photographs import resolve
from train.processes import joined
from train.stopping import Stop, Stopped

EXAMPLES = """
examples:
  python -m train.main --config configs/debug.py --workdir runs/debug
  python -m train.main --config configs/debug.py --workdir runs/debug --resume --steps 600
  python -m train.main --config configs/flux_dev_512.py --workdir runs/512 --bundle bundles/flux-dev \\
      --data.path data/subjects200k --mesh.fsdp 16 --batch 64
  python -m train.main --config configs/debug.py --fields      every field with its value
"""


@dataclass(frozen=True)
class Arguments:
    """Trains the adapter (or the base) of a recipe; every field of the recipe can be set: --any.field value."""

    config: Path = argument("a recipe, such as configs/debug.py", unit="FILE")
    workdir: str | None = argument(
        "checkpoints, metrics and samples go there; it may be gs://BUCKET/FOLDER", default=None, unit="DIR"
    )
    resume: bool = argument("go on with the run in --workdir, if there is one", default=False)
    resume_from: int | None = argument(
        "go on from this checkpoint in place of the latest; later ones are kept in --workdir/set_aside",
        default=None,
        unit="STEP",
    )
    overwrite: bool = argument("delete the run in --workdir and start anew", default=False)
    fields: bool = argument("list the recipe's fields and exit", default=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; 143 or 130 if SIGTERM or SIGINT ended the run before its last step."""
    with Stop() as stop:
        try:
            _train(argv, stop)
        except Stopped:
            print(f"stopped by {stop.asked}; there was nothing new to save", file=sys.stderr)
        return stop.status


def _train(argv: Sequence[str] | None, stop: Stop) -> None:
    args, words = parse_known(Arguments, argv, "python -m train.main", EXAMPLES)
    config = config_.override(config_.load(args.config), ["--help"] if args.fields else words)
    if args.workdir is None:
        raise UserError("`workdir`: not given; expected a folder for the run; pass --workdir runs/NAME")
    resume = args.resume or args.resume_from is not None
    if resume and args.overwrite:
        given = "resume" if args.resume else "resume_from"
        raise UserError(f"`{given}` and `overwrite`: they exclude each other; pass one")

    workdir = as_path(args.workdir)
    with joined(config.distributed, stop):
        config = resolve(config)

        from train.loop import train

        train(config, workdir, resume=resume, overwrite=args.overwrite, resume_from=args.resume_from, stop=stop)


if __name__ == "__main__":
    keep_compiled()
    sys.exit(run_cli(main))
