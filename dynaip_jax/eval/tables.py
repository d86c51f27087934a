"""Rows of an evaluation: as JSON has them, and as aligned text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

from dynaip_jax.eval.statistics import bootstrap_intervals, mean_interval

DIGITS = 4  # of stored numbers
NO_QUESTION = "trained differently"  # of a stored row that says nothing


class Row(TypedDict):
    """One row of the table. `cp`, `pf`, `cp_pf`: means over `n` cases; `*_ci`: their 95 % bootstrap intervals.

    `parts`: mean and interval of each part of CP and PF and of each leak, by name. Only rows of adapters that were trained differently have
    `asks` (the question the row answers), `seed` and `steps`.
    """

    name: str
    subjects: int
    n: int
    cp: float
    pf: float
    cp_pf: float
    cp_ci: list[float]
    pf_ci: list[float]
    cp_pf_ci: list[float]
    parts: NotRequired[dict[str, list[float]]]
    asks: NotRequired[str]
    seed: NotRequired[int]
    steps: NotRequired[int]


def make_row(
    name: str, subjects: int, cp: np.ndarray, pf: np.ndarray, parts: Mapping[str, np.ndarray] | None = None
) -> Row:
    """The row of CP and PF, `[n]` each, and of `parts`; the product of both is taken case by case."""
    values = np.stack([cp, pf, cp * pf])
    mean_cp, mean_pf, mean_cp_pf = values.mean(axis=1).round(DIGITS).tolist()
    cp_ci, pf_ci, cp_pf_ci = bootstrap_intervals(values).round(DIGITS).tolist()
    return Row(
        name=name, subjects=subjects, n=len(cp), cp=mean_cp, pf=mean_pf, cp_pf=mean_cp_pf,
        cp_ci=cp_ci, pf_ci=pf_ci, cp_pf_ci=cp_pf_ci, parts=parts_of(parts or {}),
    )  # fmt: skip


class Difference(TypedDict):
    """How much row `name` is above row `against` in the same `n` cases: mean and 95 % bootstrap interval of the differences."""

    name: str
    against: str
    subjects: int
    n: int
    cp: list[float]
    pf: list[float]
    cp_pf: list[float]
    parts: dict[str, list[float]]


def parts_of(values: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Mean and interval of each measure `[n]`, of cases that are not NaN; without those that no case has."""
    intervals = {name: np.round(mean_interval(value), DIGITS).tolist() for name, value in values.items()}
    return {name: interval for name, interval in intervals.items() if not np.isnan(interval[0])}


def parts_table(rows: Sequence[Row]) -> str:
    """The parts of rows as aligned text, means alone."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("parts", ())))
    lines: list[Sequence[str]] = [("row", "subjects", *names)]
    for row in rows:
        parts = row.get("parts", {})
        cells = [f"{parts[name][0]:.3f}" if name in parts else "" for name in names]
        lines.append((row["name"], str(row["subjects"]), *cells))
    return aligned(lines)


def differences_table(differences: Sequence[Difference]) -> str:
    """Differences as aligned text, 95 % intervals in brackets; leaks, which are parts, too."""
    leaks = list(dict.fromkeys(name for d in differences for name in d["parts"] if name.startswith("leak")))
    titles = [cell for title in ("CP", "PF", "CP·PF", *leaks) for cell in (title, "")]
    lines: list[Sequence[str]] = [("row", "minus", "subjects", "cases", *titles)]
    for d in differences:
        values = [d["cp"], d["pf"], d["cp_pf"], *(d["parts"].get(name) for name in leaks)]
        cells = [cell for value in values for cell in (_interval(value[0], value[1:], "+") if value else ("", ""))]
        lines.append((d["name"], d["against"], str(d["subjects"]), str(d["n"]), *cells))
    return aligned(lines)


def table(rows: Sequence[Row], questions: Mapping[str, str]) -> str:
    """Rows as aligned text, 95 % intervals in brackets. `questions`: what a row asks, by its name."""
    lines: list[Sequence[str]] = [("row", "subjects", "cases", "CP", "", "PF", "", "CP·PF", "", "asks")]
    for row in rows:
        question = questions.get(row["name"]) or row.get("asks", NO_QUESTION)
        cells = [
            *_interval(row["cp"], row["cp_ci"]),
            *_interval(row["pf"], row["pf_ci"]),
            *_interval(row["cp_pf"], row["cp_pf_ci"]),
        ]
        lines.append((row["name"], str(row["subjects"]), str(row["n"]), *cells, question))
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _interval(value: float, interval: Sequence[float], sign: str = "") -> tuple[str, str]:
    low, high = interval
    return f"{value:{sign}.3f}", f"[{low:{sign}.3f}, {high:{sign}.3f}]"
