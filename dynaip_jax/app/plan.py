"""`dynaip plan`: does a recipe fit a TPU topology or these devices, and how fast could it be?

Recipes and the trainer are not installed; they lie in a checkout. So this command runs another, `python -m train.plan`, in the
checkout that holds the recipe. Both have these arguments.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dynaip_jax.commandline import argument, parse_known
from dynaip_jax.errors import UserError
from dynaip_jax.interrupts import GRACE
from dynaip_jax.reading import is_file

EXAMPLES = """
examples:
  dynaip plan --config configs/flux_dev_1024.py --topology v5e:4x4
      training at 1024 pixels on 16 chips of a TPU v5e
  dynaip plan --config configs/flux_dev_1024.py --topology v5e:16x16 --mesh data=16,fsdp=16 --batch 256
      the same on 256 chips; a recipe's fields are set as in train.main
  dynaip plan --config configs/flux_dev_1024.py --topology v6e:2x2 --job sample
      one picture on four chips
"""


@dataclass(frozen=True)
class Arguments:
    """Compiles a recipe's real programs, for TPUs on any machine (needs libtpu: pip install 'jax[tpu]'), and prints memory, exchanges
    between chips and what the data sheet allows. Exit status 1 if it does not fit. Runs in a checkout."""

    config: Path = argument("a recipe, such as configs/flux_dev_1024.py", unit="FILE")
    topology: str | None = argument(
        "of TPUs, such as v5e:4x4, or 2xv5e:4x4 for two slices",
        default=None,
        usual="the devices that are here",
        unit="NAME",
    )
    mesh: str | None = argument(
        "such as data=2,fsdp=8", default=None, usual="the recipe's; for sampling tensor=-1", unit="AXES"
    )
    job: Literal["train", "sample"] = argument("what to plan", default="train")
    weights: Literal["full", "int8", "fp8"] = argument("when sampling: see dynaip sample", default="full")
    offload_text: bool = argument("when sampling: see dynaip sample", default=False)
    json: bool = argument("print JSON instead of text", default=False)


def read(argv: Sequence[str] | None) -> tuple[Arguments, list[str]]:
    """The arguments, and the words that set fields of the recipe."""
    return parse_known(Arguments, argv, "dynaip plan", EXAMPLES)


def main(argv: Sequence[str]) -> int:
    """Runs `train.plan` of the checkout with the same words; its exit status."""
    args, _ = read(argv)
    root = args.config.resolve().parent.parent
    if not is_file(root / "train" / "plan.py"):
        raise UserError(
            f"`config` {args.config}: {root} is no checkout of dynaip_jax; expected a recipe in its configs/; run plan there"
        )
    # From the folder it was called in, so that relative paths hold; -P: with that folder's own `train` out of the way.
    command = [sys.executable, "-P", "-m", "train.plan", *argv]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(command, env=os.environ | dict(PYTHONPATH=path), stdin=subprocess.DEVNULL) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:  # which a terminal gives to the process too
            try:
                status = process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.terminate()
                status = process.wait()
    return status if status >= 0 else 128 - status
