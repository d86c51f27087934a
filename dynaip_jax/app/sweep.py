"""`dynaip sweep`: one prompt drawn over a grid of two options, as one labelled figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaip_jax.app import asking, figures
from dynaip_jax.app.opening import FILES
from dynaip_jax.app.options import PICTURE, given_options, with_options
from dynaip_jax.commandline import argument
from dynaip_jax.errors import UserError
from dynaip_jax.interrupts import at_stake
from dynaip_jax.sampling import sweeping
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.sampling.sweeping import Axis
from dynaip_jax.tasks import task

if TYPE_CHECKING:
    from dynaip_jax.sampling.opening import Opened
    from dynaip_jax.sampling.request import Request

PROG = "dynaip sweep"
EXAMPLES = """
examples:
  dynaip sweep --x image_scale=0.2,0.6,1 --y text_gain=0,0.5,1 --prompt "a star on the left on sand at noon" \\
      --reference my-star.png --output sweep.png
      nine pictures in a grid, and sweep.json: the settings of each
  dynaip sweep --x seed=0,1,2,3 --y granularity=default,1:0:0,0:1:0,0:0:1 --like star.png --output levels.png
      the picture star.png with other seeds and levels; "default" is the option's default, here the router
"""


@dataclass(frozen=True)
class Arguments(asking.Asking):
    """Draws one prompt once for every pair of values of two options, and puts the pictures into a labelled figure; the settings of each
    lie beside it as JSON."""

    x: str | None = argument(
        "an option and its values, along columns (needed)", default=None, unit="OPTION=V,V,...", group=PICTURE
    )
    y: str | None = argument("a second one, along rows", default=None, unit="OPTION=V,V,...", group=PICTURE)
    output: str | None = argument(
        "the figure; the settings get the same name with .json (needed)", default=None, unit="OUT.png", group=FILES
    )


def main(argv: Sequence[str]) -> int:
    """Draws the figure; prints the names of the files."""
    typed = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    args, argv, like = asking.read(with_options(Arguments), argv, PROG, EXAMPLES)
    given, subjects = given_options(args), asking.subjects_of(args, argv)
    asking.check_one_picture(args, given)
    if args.x is None:
        raise UserError("`x`: none given; expected an option and its values; pass --x image_scale=0.2,0.6,1")
    x, y = sweeping.read_axis(args.x, "x"), None if args.y is None else sweeping.read_axis(args.y, "y")
    for axis in (x, y):
        if axis is not None and axis.option in typed:
            raise UserError(f"`{axis.option}`: given, and varied; expected either; leave one out")
    asking.check_subjects(args, given | {axis.option: axis for axis in (x, y) if axis is not None}, subjects)
    cells = sweeping.grid(SampleOptions(**given), x, y)
    output = Path(args.output)
    figures.check(output, (".json",), overwrite=args.overwrite)
    asked = asking.opened(args, subjects, like)
    requests = [[asked.request(options) for options in row] for row in cells]
    asking.check_like(asked, requests[0][0], like)
    with at_stake("the figure is lost"):
        pictures, settings = _drawn(asked.opened, requests, asking.given_files(args, subjects))
        return _saved(pictures, settings, args.prompt[0], x, y, output, overwrite=args.overwrite)


def _drawn(
    opened: Opened, requests: Sequence[Sequence[Request]], files: dict[str, Any]
) -> tuple[list[list[Any]], list[list[dict[str, Any]]]]:
    """The picture and the settings of each request. Those of one shape share a compiled program."""
    from dynaip_jax.sampling.pipeline import DynaIPPipeline

    with task(f"loading {opened.model.bundle.path}"):
        pipe = DynaIPPipeline.read(opened)
    pictures, settings = [], []
    with task("drawing", sum(map(len, requests)), "picture") as done:
        for row in requests:
            made: list[Any] = []
            for request in row:
                made += pipe.draw(request)
                done()
            pictures.append([part.images[0] for part in made])
            settings.append([part.settings_of(0) | files for part in made])
    return pictures, settings


def _saved(
    pictures: list[list[Any]],
    settings: list[list[dict[str, Any]]],
    prompt: str,
    x: Axis,
    y: Axis | None,
    output: Path,
    *,
    overwrite: bool,
) -> int:
    """Writes the figure and its JSON -> the exit status."""
    import numpy as np

    from dynaip_jax.eval.figures import Cell, table

    cells = [[Cell(np.asarray(picture)) for picture in row] for row in pictures]
    figure = table(cells, x.labels, [""] if y is None else y.labels, prompt)
    axes = {
        name: None if axis is None else dict(option=axis.option, values=axis.values)
        for name, axis in (("x", x), ("y", y))
    }
    path = figures.keep(figure, output, dict(prompt=prompt, **axes), overwrite=overwrite)
    values = dict(prompt=prompt, **axes, pictures=settings)
    figures.beside(path, ".json", json.dumps(values, indent=1, allow_nan=False).encode())
    return 0 if path == output else 1
