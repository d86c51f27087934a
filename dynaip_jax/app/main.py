"""The `dynaip` command. Heavy imports wait until a command runs, so that --help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dynaip_jax.app import asking, demo, evaluate, maps, plan, plot, routing, sample, serve, sweep
from dynaip_jax.commandline import Command, choose, run_cli
from dynaip_jax.runtime.compiling import keep_compiled
from dynaip_jax.version import __version__

DOC = "DynaIP in JAX: pictures of your subject from a reference image and a prompt, without fine-tuning."
COMMANDS = dict(
    sample=Command(sample.main, "make pictures", sample.FLAGS),
    demo=Command(demo.main, "one figure of what the method does, and its measurements, with the embedded model"),
    evaluate=Command(evaluate.main, "measure how well subjects and prompts are kept"),
    plot=Command(plot.main, "training curves of several runs in one figure", plot.FLAGS),
    sweep=Command(sweep.main, "one prompt over a grid of two options, in one figure", asking.FLAGS),
    maps=Command(maps.main, "where the references act in a picture, block by block", asking.FLAGS),
    routing=Command(routing.main, "what the router gives CLIP's levels, for each of several pictures", routing.FLAGS),
    serve=Command(serve.main, "a page on this machine that draws", asking.FLAGS),
    plan=Command(plan.main, "does a recipe fit a TPU topology or these devices, and how fast could it be"),
)
KEEP_NOTHING = ("plan", "serve")  # one times compilations, the other writes nothing outside of its own folder


def run(argv: Sequence[str]) -> int:
    """Runs the command that `argv` begins with; raises `UserError` if there is none."""
    if argv and argv[0] == "--version":
        print(f"dynaip_jax {__version__}")
        return 0
    return choose("dynaip", DOC, COMMANDS, argv, sample.EXAMPLES)


def main() -> int:
    """Entry point of the `dynaip` script."""
    words = sys.argv[1:]
    if words and words[0] in COMMANDS and words[0] not in KEEP_NOTHING and not {"-h", "--help"} & {*words}:
        keep_compiled()
    return run_cli(run)


if __name__ == "__main__":
    sys.exit(main())
