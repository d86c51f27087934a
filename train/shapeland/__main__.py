"""Trains a model of Shapeland from nothing: autoencoder, encoders, judge, base model and adapter.

python -m train.shapeland --workdir runs/shapeland

Stages run in order. A finished stage is not run again; one that was cut off resumes from its last checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dynaip_jax.commandline import Parser, run_cli
from dynaip_jax.errors import UserError
from dynaip_jax.runtime.compiling import keep_compiled
from train.shapeland.stages import EXTRA, KEPT, STAGES, run_stage


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages that `argv` asks for. Raises `UserError` for those that `--go-on` keeps."""
    parser = Parser(
        prog="python -m train.shapeland",
        description="Trains all models of Shapeland from nothing, stage by stage; run again to resume.",
    )
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="where all files go")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=[*STAGES, *EXTRA],
        metavar="STAGE",
        help=f"only these: {', '.join(STAGES)}; or {', '.join(EXTRA)}, which runs only when named",
    )
    parser.add_argument(
        "--go-on",
        action="store_true",
        help="start from the models in the package: train base and judge further, T5 and adapter anew, keep the rest",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of worlds, weights and order (default 0)")
    args = parser.parse_args(argv)
    usual = KEPT if args.go_on else STAGES
    stages = usual | EXTRA
    for name in args.stages or usual:
        if name not in stages:
            raise UserError(
                f"--stages {name}: is kept with --go-on; expected some of {', '.join(stages)}; leave it out"
            )
        run_stage(name, stages[name], args.workdir, args.seed)
    return 0


if __name__ == "__main__":
    keep_compiled()
    sys.exit(run_cli(main))
