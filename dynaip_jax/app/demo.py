"""`dynaip demo`: one figure of what the method does, with the embedded model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynaip_jax.commandline import argument, parse
from dynaip_jax.errors import UserError
from dynaip_jax.interrupts import at_stake
from dynaip_jax.tasks import task


@dataclass(frozen=True)
class Arguments:
    """Draws a figure with the embedded model of Shapeland (ten references that nobody chose, each in two scenes, with DDS off and on; two and
    three subjects) and prints a short table of measurements; with a picture of your own only a figure (text only, DDS off and on, granularity)."""

    reference: Path | None = argument("a drawing of your own, seen close (needs --prompt)", default=None, unit="IMG")
    prompt: str | None = argument(
        'what to make of it: "a heart on the left on snow at dusk"', default=None, unit="TEXT"
    )
    output: str = argument("the figure", default="demo.png", unit="OUT.png")
    overwrite: bool = argument("replace an existing picture", default=False)


def main(argv: Sequence[str]) -> int:
    """Draws the figure; prints its name and, if the drawing is not the user's, measurements."""
    args = parse(Arguments, argv, "dynaip demo")
    if (args.reference is None) != (args.prompt is None):
        given, missing = ("reference", "prompt") if args.prompt is None else ("prompt", "reference")
        raise UserError(f"`{given}`: given without `{missing}`; expected both, or neither; add `{missing}`")

    from dynaip_jax import images

    images.check_png_path(args.output, overwrite=args.overwrite)

    from dynaip_jax.shapeland import demo as figure

    with at_stake("the figure is lost"), task("drawing the figure"):
        kept = figure.draw(Path(args.output), args.reference, args.prompt, overwrite=args.overwrite)
    if kept.reason is not None:
        print(f"warning: {args.output}: cannot be written ({kept.reason}); saved as {kept.path}", file=sys.stderr)
    print(kept.path, flush=True)
    if args.reference is None:
        print(f"{figure.LOOK_AT}\n\n{figure.measures()}")
    return 0 if kept.reason is None else 1
