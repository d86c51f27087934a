"""Trains a model of Shapeland from nothing: autoencoder, encoders, judge, base model and adapter.

python -m train.shapeland --workdir runs/shapeland

Stages run in order. A finished stage is not run again; one that was cut off resumes from its last checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dynaip_jax.commandline import argument, parse, run_cli
from dynaip_jax.errors import UserError
from dynaip_jax.runtime.compiling import keep_compiled
from dynaip_jax.shapeland.dataset import UNSAID
from train.shapeland.stages import EXTRA, KEPT, STAGES, run_stage
from train.shapeland.world import check_world, write_world


@dataclass(frozen=True)
class Arguments:
    """Trains all models of Shapeland from nothing, stage by stage; run again to resume."""

    workdir: Path = argument("where all files go", unit="DIR")
    stages: tuple[str, ...] | None = argument(
        f"only these: {', '.join(STAGES)}; or {', '.join(EXTRA)}, which runs only when named",
        default=None,
        unit="STAGE [STAGE ...]",
    )
    go_on: bool = argument(
        "start from the models in the package: train base, judge and adapter further, keep the rest",
        default=False,
    )
    describe_everything: bool = argument("captions leave nothing open", default=False)
    seed: int = argument("of worlds, weights and order", default=0, unit="N")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages that `argv` asks for. Raises `UserError` for those that there are not, or that `--go-on` keeps."""
    args = parse(Arguments, argv, "python -m train.shapeland")
    if unknown := [name for name in args.stages or () if name not in STAGES | EXTRA]:
        raise UserError(f"--stages {unknown[0]}: no such stage; expected some of {', '.join(STAGES | EXTRA)}")
    usual = KEPT if args.go_on else STAGES
    unsaid = 0.0 if args.describe_everything else UNSAID
    check_world(args.workdir / "world", unsaid)
    stages = usual | EXTRA | dict(world=partial(write_world, unsaid=unsaid))
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
