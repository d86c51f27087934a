"""`dynaip routing`: what the router gives CLIP's low, middle and high level, picture by picture and over a set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dynaip_jax.app import figures
from dynaip_jax.app.opening import Loading, open_for
from dynaip_jax.commandline import argument, parse
from dynaip_jax.errors import UserError
from dynaip_jax.tasks import task

if TYPE_CHECKING:
    import numpy as np

    from dynaip_jax.sampling.opening import Opened

EXAMPLES = """
examples:
  dynaip routing photographs/*.jpg --model bundles/flux-dev --adapter adapters/mine --output routing.png
      routing.png: a bar a picture, means in the legend; routing.json: the values, with 95 % intervals of the means
"""
MOST = 10_000  # pictures
BARS = 60  # of pictures, in the figure


@dataclass(frozen=True)
class Arguments(Loading):
    """Shows the routing weights of an adapter's HMoE: for each reference picture, and their means over all of them with 95 % intervals.
    Nothing is sampled. The values lie beside the figure as JSON."""

    pictures: tuple[str, ...] = argument("reference pictures", unit="IMG", positional=True)
    fit: Literal["pad", "crop"] = argument("how one that is not square becomes so", default="pad")
    output: Path = argument(
        "the figure; the values get the same name with .json", default=Path("routing.png"), unit="OUT.png"
    )
    overwrite: bool = argument("replace existing files", default=False)


FLAGS = dict(bundle="--model", pictures="IMG")


def main(argv: Sequence[str]) -> int:
    """Draws the figure; prints the names of the files."""
    args = parse(Arguments, argv, "dynaip routing", EXAMPLES)
    if args.model is not None and args.adapter is None:
        raise UserError("`adapter`: none given; expected the one whose router this is; pass --adapter DIR")
    if len(args.pictures) > MOST:
        raise UserError(f"`pictures`: {len(args.pictures)}; expected at most {MOST}; leave some out")
    figures.check(args.output, (".json",), overwrite=args.overwrite)

    from dynaip_jax import images

    opened = open_for(args, True)
    if getattr(opened.model.adapter, "hmoe", None) is None:
        raise UserError(
            f"`adapter` {args.adapter}: has no router; expected a DynaIP adapter, which mixes CLIP's levels; pass another"
        )
    pictures = [images.load_image(path) for path in args.pictures]
    weights = _weights(opened, pictures, args.fit)
    return _saved(args, weights)


def _weights(opened: Opened, pictures: Sequence[np.ndarray], fit: str) -> np.ndarray:
    """Routing weights `[n, 3]`, of a token router the mean of its tokens. Reads no more than CLIP and the adapter."""
    import numpy as np

    from dynaip_jax.sampling.conditions import reference_pixels, routing

    with task("loading CLIP and the adapter"):
        vision, adapter = opened.read_encoder()
    family, config = opened.model.family, opened.model.adapter
    found = []
    with task("routing", len(pictures), "picture") as done:
        for picture in pictures:
            found.append(np.asarray(routing(family, config, vision, adapter, reference_pixels(family, [picture], fit))))
            done()
    return np.concatenate(found)


def _saved(args: Any, weights: np.ndarray) -> int:
    """Writes figure and values -> the exit status."""
    from dynaip_jax.adapters.hmoe import LEVEL_NAMES
    from dynaip_jax.eval.figures import shares
    from dynaip_jax.eval.statistics import bootstrap_intervals

    means, intervals = weights.mean(axis=0), bootstrap_intervals(weights.T.astype(float))
    summary = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, (low, high) in zip(means, intervals, strict=True)]
    names = [Path(path).name for path in args.pictures]
    figure = shares(weights[:BARS], names[:BARS], LEVEL_NAMES, summary)
    path = figures.keep(figure, args.output, dict(pictures=list(args.pictures)), overwrite=args.overwrite)
    levels = {
        level: dict(mean=round(float(mean), 5), interval=[round(float(x), 5) for x in interval])
        for level, mean, interval in zip(LEVEL_NAMES, means, intervals, strict=True)
    }
    rows = [
        dict(picture=name, weights=dict(zip(LEVEL_NAMES, row.round(5).tolist(), strict=True)))
        for name, row in zip(args.pictures, weights, strict=True)
    ]
    figures.beside(path, ".json", json.dumps(dict(means=levels, pictures=rows), indent=1, allow_nan=False).encode())
    return 0 if path == args.output else 1
