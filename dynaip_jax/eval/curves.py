"""Training curves: what runs wrote into their `metrics.jsonl`, side by side."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from dynaip_jax.errors import UserError, reason
from dynaip_jax.reading import parse_json

FILE = "metrics.jsonl"
USUAL = ("loss", "validation_loss", "grad_norm", "learning_rate", "images_per_second")
COLUMNS = 2  # of plots


class Curve(NamedTuple):
    """Values by training step: `steps` int `[n]`, ascending; `values` float `[n]`."""

    steps: np.ndarray
    values: np.ndarray


Curves = Mapping[str, Curve]  # by the name of the metric


def read_curves(workdir: str | os.PathLike[str]) -> tuple[Curves, list[int]]:
    """All metrics of the run in a folder, on a disk or in a bucket, and the numbers of lines that cannot be read.

    The last line may be half written, by a run that goes on or was killed; it is left out and not counted. Raises `UserError` where there is
    no such file, and where no line of it holds a number.
    """
    path = epath.Path(workdir) / FILE
    try:
        lines = path.read_bytes().splitlines()
    except (OSError, ValueError) as e:
        raise UserError(
            f"`runs` {workdir}: its {FILE} cannot be read ({reason(e)}); expected the workdir of a training run; check the path"
        ) from e
    points: dict[str, list[tuple[int, float]]] = {}
    damaged = []
    for number, line in enumerate(lines, 1):
        try:
            values = parse_json(line)
            step = int(values.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            damaged.append(number)
            continue
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                points.setdefault(name, []).append((step, float(value)))
    if not points:
        raise UserError(f"`runs` {path}: no line holds a number by its step; expected at least one; wait for the first")
    curves = {name: Curve(*map(np.array, zip(*sorted(found), strict=True))) for name, found in points.items()}
    return curves, [number for number in damaged if number != len(lines)]


def choose(runs: Mapping[str, Curves], names: Sequence[str] | None) -> list[str]:
    """The metrics to plot: those asked for, or of `USUAL` those that a run has. Raises `UserError` for one that no run has."""
    known = sorted({name for curves in runs.values() for name in curves})
    for name in names or ():
        if name not in known:
            raise UserError(f"`metrics` {name}: in none of these runs; expected some of {', '.join(known)}")
    return list(names or [name for name in USUAL if name in known] or known)


def labels(paths: Sequence[str]) -> list[str]:
    """A short name for each path: its last part, with as many parts before it as tell the paths apart. Raises `UserError` for a path
    given twice."""
    parts = [os.path.normpath(path).split(os.sep) for path in paths]
    for one, other in itertools.combinations(range(len(parts)), 2):
        if parts[one] == parts[other]:
            raise UserError(f"`runs` {paths[other]}: given twice; expected different runs; leave one out")
    deepest = max(map(len, parts))
    for count in range(1, deepest + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def smoothed(curve: Curve, window: int) -> Curve:
    """The mean of each value and its neighbours, `window` in all; at the ends of those that are left. A curve of fewer than two
    windows stays as it is."""
    count = len(curve.values)
    if count < 2 * window:
        return curve
    sums = np.cumsum(np.concatenate([[0.0], curve.values]))
    first = np.maximum(0, np.arange(count) - (window - 1) // 2)
    last = np.minimum(count, np.arange(count) + window // 2 + 1)
    return Curve(curve.steps, (sums[last] - sums[first]) / (last - first))


def figure(runs: Mapping[str, Curves], names: Sequence[str], window: int = 1) -> Image.Image:
    """A plot a metric, a line a run; with a `window` the means of `smoothed` over the pale values."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    sheet = Figure(figsize=(6.4 * columns, 3.6 * rows), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(sheet)
    axes = sheet.subplots(rows, columns, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        for number, (label, curves) in enumerate(runs.items()):
            if name in curves:
                curve, color, dot = curves[name], f"C{number % 10}", "." if len(curves[name].steps) < 30 else ""
                if window > 1:
                    axis.plot(*curve, color=color, alpha=0.25, linewidth=1)
                axis.plot(*smoothed(curve, window), color=color, label=label, marker=dot)
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in axes[len(names) :]:
        axis.remove()
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def as_csv(runs: Mapping[str, Curves], names: Sequence[str]) -> str:
    """The values as they were written, a line each: run, metric, step, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", "metric", "step", "value"))
    for label, curves in runs.items():
        for name in names:
            if name in curves:
                steps, values = curves[name]
                writer.writerows(
                    (label, name, int(step), float(value)) for step, value in zip(steps, values, strict=True)
                )
    return text.getvalue()
