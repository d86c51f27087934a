"""Scores of the pictures of a run: a row a picture, a column a measure; their means, and what differs from another run.

Intervals are over prompts: pictures of one prompt count as their mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynaip_jax import reading
from dynaip_jax.errors import UserError
from dynaip_jax.eval.statistics import bootstrap_intervals
from dynaip_jax.eval.tables import aligned
from dynaip_jax.schema import typed

FILE, FORMAT = "scores.json", 1
LOWER = ("collapsed",)  # columns of which less is better
DIGITS = 6


class Row(NamedTuple):
    """A picture: its case, its number among those of the case, its file in the run's folder, its scores by column (None: there is none),
    and what the judge said, by measure."""

    case: str
    number: int
    file: str
    scores: dict[str, float | None]
    reasons: dict[str, str]


class Scores(NamedTuple):
    """All of a run. `fingerprint`: of the set; `name`: of its layout; `settings`: how its pictures were made."""

    fingerprint: str
    name: str
    settings: dict[str, Any]
    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        """Measures that at least one picture has."""
        return list(dict.fromkeys(name for row in self.rows for name, x in row.scores.items() if x is not None))

    def by_case(self, column: str) -> dict[str, float]:
        """The mean of each case's pictures, where all of them have a score."""
        values: dict[str, list[float | None]] = {}
        for row in self.rows:
            values.setdefault(row.case, []).append(row.scores.get(column))
        return {
            case: float(np.mean(found)) for case, each in values.items() if len(found := _numbers(each)) == len(each)
        }

    def as_json(self) -> bytes:
        """What `read_scores` reads."""
        rows = [row._asdict() for row in self.rows]
        content = dict(format=FORMAT, fingerprint=self.fingerprint, name=self.name, settings=self.settings, rows=rows)
        return (json.dumps(content, indent=1) + "\n").encode()


class Mean(NamedTuple):
    """A column's mean over `cases` prompts with its 95 % interval; with another run, its mean and the difference, both over the prompts that
    both have."""

    column: str
    cases: int
    mean: float
    interval: tuple[float, float]
    other: float | None = None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None


def read_scores(run: Path) -> Scores:
    """Those of the run in a folder. Raises `UserError` if there are none, or none of this version."""
    path, remedy = run / FILE, "evaluate that run again"
    value = reading.read_json(path, expected="the scores of a run of dynaip evaluate set", remedy=remedy)
    try:
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']!r}, this program reads {FORMAT}")
        rows = [
            Row(
                typed(str, row["case"], "case"),
                typed(int, row["number"], "number"),
                _inside(typed(str, row["file"], "file")),
                typed(dict[str, float | None], row["scores"], "scores"),
                typed(dict[str, str], row["reasons"], "reasons"),
            )
            for row in value["rows"]
        ]
        settings = typed(dict[str, Any], value["settings"], "settings")
        return Scores(
            typed(str, value["fingerprint"], "fingerprint"), typed(str, value["name"], "name"), settings, rows
        )
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: {e}; expected the scores of a run of dynaip evaluate set; {remedy}") from e


def check_comparable(own: Scores, other: Scores, path: Path) -> None:
    """Raises `UserError` if the runs are of different sets, have other numbers of pictures, or no measure by the same network."""
    if own.fingerprint != other.fingerprint:
        raise UserError(
            f"`against` {path}: a run of another set (prompts, words or pictures differ); expected one of the same; evaluate it on this set"
        )
    if [(row.case, row.number) for row in own.rows] != [(row.case, row.number) for row in other.rows]:
        raise UserError(
            f"`against` {path}: {len(other.rows)} pictures, this run has {len(own.rows)} or others; expected the same `num_images` and `limit`"
        )
    if own.columns and not set(own.columns) & set(other.columns):
        raise UserError(
            f"`against` {path}: measured by {', '.join(other.columns) or 'nothing'}, this run by {', '.join(own.columns)}; expected one in "
            "common; measure both by the same networks"
        )


def means(own: Scores, other: Scores | None = None) -> list[Mean]:
    """Of all columns."""
    found = []
    for column in own.columns:
        values = own.by_case(column)
        if not values:
            continue
        (interval,) = bootstrap_intervals(np.array([list(values.values())]))
        mean = Mean(column, len(values), float(np.mean(list(values.values()))), _pair(interval))
        theirs = {} if other is None else other.by_case(column)
        if both := [case for case in values if case in theirs]:
            differences = np.array([[values[case] - theirs[case] for case in both]])
            (interval,) = bootstrap_intervals(differences)
            mean = mean._replace(
                other=float(np.mean([theirs[case] for case in both])),
                difference=float(differences.mean()),
                difference_interval=_pair(interval),
            )
        found.append(mean)
    return found


def table(found: Sequence[Mean]) -> str:
    """Means as aligned text, 95 % intervals in brackets."""
    compared = any(mean.other is not None for mean in found)
    lines: list[Sequence[str]] = [
        ("measure", "prompts", "mean", "", *(("other", "difference", "") if compared else ()))
    ]
    for mean in found:
        cells = [mean.column, str(mean.cases), f"{mean.mean:.4f}", bracket(mean.interval)]
        if compared:
            cells += (
                ["", "", ""]
                if mean.difference is None
                else [f"{mean.other:.4f}", f"{mean.difference:+.4f}", bracket(mean.difference_interval)]
            )
        lines.append(cells)
    return aligned(lines)


def bracket(interval: tuple[float, float] | None) -> str:
    """Such as "[0.1000, 0.2000]"."""
    return "" if interval is None else f"[{interval[0]:.4f}, {interval[1]:.4f}]"


def worst_first(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Rows by the mean of their ranks in all columns, the worst first; those without any score come last."""
    ranks: dict[int, list[float]] = {n: [] for n in range(len(rows))}
    for column in columns:
        known = {n: x for n, row in enumerate(rows) if (x := row.scores.get(column)) is not None}
        values = sorted(known.values(), reverse=column in LOWER)
        places = {value: at / max(1, len(values) - 1) for at, value in reversed(list(enumerate(values)))}
        for n, value in known.items():
            ranks[n].append(places[value])
    order = sorted(ranks, key=lambda n: (not ranks[n], np.mean(ranks[n]) if ranks[n] else 0, n))
    return [rows[n] for n in order]


def _inside(file: str) -> str:
    """A file's name, if it lies in the folder of its run. Raises `ValueError` if not: a run may be somebody else's."""
    path = Path(file)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"file {file[:60]!r}: expected one in the folder of the run")
    return file


def rounded(scores: Mapping[str, float | None]) -> dict[str, float | None]:
    """Scores as they are stored."""
    return {name: None if x is None else round(float(x), DIGITS) for name, x in scores.items()}


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [x for x in values if x is not None]


def _pair(interval: np.ndarray) -> tuple[float, float]:
    return float(interval[0]), float(interval[1])
