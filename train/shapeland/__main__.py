"""python -m train.shapeland: see `train.shapeland.stages`."""

import sys

from dynaip_jax.commandline import run_cli
from dynaip_jax.runtime.compiling import keep_compiled
from train.shapeland.stages import main

if __name__ == "__main__":
    keep_compiled()
    sys.exit(run_cli(main))
