"""Trains an adapter (or a base).

python -m train.main --config configs/debug.py --workdir runs/debug
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynaip_jax.commandline import argument, parse_known, run_cli
from dynaip_jax.errors import UserError
from dynaip_jax.runtime.compiling import keep_compiled
from dynaip_jax.storage.folders import as_path
from train import config as config_
from train.photographs import resolve

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
    overwrite: bool = argument("delete the run in --workdir and start anew", default=False)
    fields: bool = argument("list the recipe's fields and exit", default=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains."""
    args, words = parse_known(Arguments, argv, "python -m train.main", EXAMPLES)
    config = config_.override(config_.load(args.config), ["--help"] if args.fields else words)
    if args.workdir is None:
        raise UserError("`workdir`: not given; expected a folder for the run; pass --workdir runs/NAME")
    if args.resume and args.overwrite:
        raise UserError("`resume` and `overwrite`: they exclude each other; pass one")

    workdir = as_path(args.workdir)
    with processes(config.distributed):
        config = resolve(config)

        from train.loop import train

        train(config, workdir, resume=args.resume, overwrite=args.overwrite)
    return 0


@contextlib.contextmanager
def processes(config: config_.DistributedConfig) -> Iterator[None]:
    """Joins the other processes of the run, if there are any; if the block fails in one of them, none goes on.

    Raises `UserError` if they do not find each other.
    """
    if not config.enabled:
        if config != config_.DistributedConfig():
            raise UserError("--distributed: has values but is not enabled; pass --distributed.enabled too")
        yield
        return
    import jax

    given: dict[str, Any] = {}
    if config.coordinator:
        given = dict(coordinator_address=config.coordinator, num_processes=config.processes, process_id=config.index)
        if not 0 <= config.index < config.processes:
            raise UserError(
                f"--distributed.index {config.index} of --distributed.processes {config.processes}: expected at least 1 "
                "process, and indices from 0; give each process its own"
            )
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as e:
        raise UserError(
            f"--distributed: the processes did not find each other ({str(e)[:120]}); check --distributed.coordinator "
            "HOST:PORT, .processes and .index"
        ) from e
    from train.agreement import agree_on_compiled

    try:
        agree_on_compiled()
        yield
    except BaseException as e:
        # Runs before JAX's own exit, which would wait for the others while they wait for this process.
        atexit.register(os._exit, 2 if isinstance(e, UserError) else 1)
        raise


if __name__ == "__main__":
    keep_compiled()
    sys.exit(run_cli(main))
