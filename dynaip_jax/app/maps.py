"""`dynaip maps`: where the references act in a picture, block by block, with DDS and without."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaip_jax.app import asking, figures
from dynaip_jax.app.opening import FILES, open_for
from dynaip_jax.app.options import PICTURE, given_options, with_options
from dynaip_jax.commandline import argument
from dynaip_jax.errors import UserError
from dynaip_jax.interrupts import at_stake
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.tasks import task

if TYPE_CHECKING:
    import numpy as np

    from dynaip_jax.eval.maps import View
    from dynaip_jax.sampling.looking import Looking
    from dynaip_jax.sampling.request import Request

PROG = "dynaip maps"
MOST_PLANTED = 100_000  # cases
EXAMPLES = """
examples:
  dynaip maps --prompt "a star on the left on sand at noon" --reference my-star.png --output maps.png
      maps.png: where the reference acts in each block, DDS on and off; maps.json: the values
  dynaip maps --like two.png --blocks 0 9 18 --output maps.png
      of a picture with two subjects: maps_regions.png too, where each belongs at each step
  dynaip maps --planted 256
      intersection over union of maps and planted subjects, with a 95 % interval
"""


@dataclass(frozen=True)
class Arguments(asking.Asking):
    """Draws a picture with DDS on (as asked) and off (text gain 1), and shows what the adapter's cross-attention does in it: where in the
    picture each subject acts, what of its reference image rows and text rows read, mean of heads, block by block; and found regions
    over the steps. The values lie beside the figure as JSON."""

    planted: int | None = argument(
        "in place of a picture: how well maps fit subjects of Shapeland whose place is known, in so many cases",
        default=None,
        unit="N",
        group=PICTURE,
    )
    looks: int = argument(
        "steps that are looked at, evenly far apart; maps are their mean", default=4, unit="N", group=PICTURE
    )
    blocks: tuple[int, ...] | None = argument(
        "blocks to show, counted from 0, double ones first",
        default=None,
        usual="8, evenly far apart",
        unit="N [N ...]",
        group=PICTURE,
    )
    output: str | None = argument(
        "the figure; the values get the same name with .json (needed)", default=None, unit="OUT.png", group=FILES
    )


def main(argv: Sequence[str]) -> int:
    """Draws the figures; prints the names of the files."""
    args, argv, like = asking.read(with_options(Arguments), argv, PROG, EXAMPLES)
    given, subjects = given_options(args), asking.subjects_of(args, argv)
    if args.planted is not None:
        return _planted(args, given, subjects)
    asking.check_one_picture(args, given)
    asking.check_subjects(args, given, subjects)
    if not subjects:
        raise UserError("`references`: none given; expected at least one, whose maps these are; pass --reference IMG")
    output, options = Path(args.output), SampleOptions(**given)
    figures.check(output, (".json",), overwrite=args.overwrite)
    regions = output.with_name(f"{output.stem}_regions.png")
    asked = asking.opened(args, subjects, like)
    on = asked.request(options)
    asking.check_like(asked, on, like)
    if on.where.get("words") is not None and len(subjects) > 1:
        figures.check(regions, (), overwrite=args.overwrite)
    steps = on.options.steps or 1
    if not 1 <= args.looks <= steps:
        raise UserError(f"`looks` {args.looks}: expected a number from 1 to {steps}, the steps of the picture")
    _check_blocks(args.blocks, asked.opened.model.family.sites, on)
    requests = dict(_named(options, on, asked.request(replace(options, text_gain=1.0))))

    from dynaip_jax.sampling import looking
    from dynaip_jax.sampling.pipeline import DynaIPPipeline

    with at_stake("the figure is lost"):
        with task(f"loading {asked.opened.model.bundle.path}"):
            pipe = DynaIPPipeline.read(asked.opened)
        looks = {}
        with task("looking", len(requests), "picture") as done:
            for label, request in requests.items():
                looks[label] = looking.look(pipe, request, looking.evenly(args.looks, steps))
                done()
        asking.routing_lines(next(iter(looks.values())).made.routing, subjects)
        return _saved(
            looks, on, output, regions, asking.given_files(args, subjects), args.blocks, overwrite=args.overwrite
        )


def _planted(args: Any, given: dict[str, Any], subjects: Sequence[asking.Subject]) -> int:
    """Measures planted subjects and prints a line."""
    for name, used in (("prompt", args.prompt), ("output", args.output), ("references", subjects), *given.items()):
        if used:
            raise UserError(f"`{name}`: of a picture, and `planted` makes none; leave it out")
    if not 1 <= args.planted <= MOST_PLANTED:
        raise UserError(f"`planted` {args.planted}: expected a number from 1 to {MOST_PLANTED}")

    from dynaip_jax.sampling.pipeline import DynaIPPipeline
    from dynaip_jax.shapeland import measure, planted

    opened = open_for(args, True)
    measure.check(opened.model, ["default"], [1])
    with task(f"loading {opened.model.bundle.path}"):
        pipe = DynaIPPipeline.read(opened)
    with task("looking", args.planted, "case") as done, at_stake("the measurement is lost"):
        print(planted.measure(pipe, args.planted, done=done).line())
    return 0


def _check_blocks(blocks: Sequence[int] | None, sites: Any, request: Request) -> None:
    most = sites.double + sites.single
    for block in blocks or ():
        if not 0 <= block < most:
            raise UserError(f"`blocks` {block}: expected numbers from 0 to {most - 1}, the blocks of this model")


def _named(options: SampleOptions, on: Request, off: Request) -> list[tuple[str, Request]]:
    """The requests that differ, with a label each."""
    gains = options.text_gain if isinstance(options.text_gain, tuple) else (options.text_gain,)
    label = "DDS on" if not any(gains) else f"text gain {' '.join(f'{gain:g}' for gain in gains)}"
    return [(label, on)] if set(gains) == {1.0} else [(label, on), ("DDS off", off)]


def view(label: str, look: Looking) -> View:
    """What a figure shows of it."""
    import numpy as np

    from dynaip_jax.eval.maps import View

    text = np.mean([glance.maps.gain[:, : look.text_rows].mean(axis=(0, 1)) for glance in look.glances], axis=0)
    return View(label, np.asarray(look.made.images[0]), look.over_picture(), look.over_references(), text.tolist())


def squares(request: Request) -> list[np.ndarray]:
    """The references of a request as their encoder sees them, in their own size; a stretched one as it was."""
    from dynaip_jax import images

    fit, given = request.options.fit, request.subjects.references
    return list(given) if fit == "stretch" else [images.square(picture, fit) for picture in given]


def _saved(
    looks: dict[str, Looking],
    request: Request,
    output: Path,
    regions_output: Path,
    files: dict[str, Any],
    blocks: Sequence[int] | None,
    *,
    overwrite: bool,
) -> int:
    """Writes figures and values -> the exit status."""
    from dynaip_jax.eval import maps

    views = [view(label, look) for label, look in looks.items()]
    first = next(iter(looks.values()))
    if blocks and max(blocks) >= len(first.names):
        raise UserError(
            f"`blocks` {max(blocks)}: this adapter acts in {len(first.names)} blocks; expected smaller numbers"
        )
    figure = maps.figure(views, squares(request), first.names, request.prompts[0], blocks)
    settings = {label: look.made.settings_of(0) | files for label, look in looks.items()}
    paths = [(output, figures.keep(figure, output, dict(maps=settings), overwrite=overwrite))]
    values = maps.as_values(views, first.names) | dict(
        settings=settings,
        steps=[each.step for each in first.glances],
        times=[round(each.time, 5) for each in first.glances],
    )
    found = first.regions()
    if found is not None and found.shape[1] > 1:
        values["regions"] = found.round(5).tolist()
        values["axes"]["regions"] = "step, subject, row, column"
        labels = [f"step {each.step + 1}, t = {each.time:.2f}" for each in first.glances]
        sheet = maps.regions_figure([each.expected for each in first.glances], found, labels, request.prompts[0])
        paths.append((regions_output, figures.keep(sheet, regions_output, dict(maps=settings), overwrite=overwrite)))
    figures.beside(paths[0][1], ".json", json.dumps(values, allow_nan=False).encode())
    return 0 if all(asked == path for asked, path in paths) else 1
