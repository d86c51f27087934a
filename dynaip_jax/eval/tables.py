"""Rows of an evaluation: as JSON has them, and as aligned text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

from dynaip_jax.eval.statistics import bootstrap_intervals

DIGITS = 4  # of stored numbers
NO_QUESTION = "trained differently"  # of a stored row that says nothing


class Row(TypedDict):
    """One row of the table. `cp`, `pf`, `cp_pf`: means over `n` cases; `*_ci`: their 95 % bootstrap intervals.

    Only rows of adapters that were trained differently have `asks` (the question the row answers), `seed` and `steps`.
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
    asks: NotRequired[str]
    seed: NotRequired[int]
    steps: NotRequired[int]


def make_row(name: str, subjects: int, cp: np.ndarray, pf: np.ndarray) -> Row:
    """The row of CP and PF, `[n]` each; their product is taken case by case."""
    values = np.stack([cp, pf, cp * pf])
    mean_cp, mean_pf, mean_cp_pf = values.mean(axis=1).round(DIGITS).tolist()
    cp_ci, pf_ci, cp_pf_ci = bootstrap_intervals(values).round(DIGITS).tolist()
    return Row(
        name=name, subjects=subjects, n=len(cp), cp=mean_cp, pf=mean_pf, cp_pf=mean_cp_pf,
        cp_ci=cp_ci, pf_ci=pf_ci, cp_pf_ci=cp_pf_ci,
    )  # fmt: skip


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


def _interval(value: float, interval: Sequence[float]) -> tuple[str, str]:
    low, high = interval
    return f"{value:.3f}", f"[{low:.3f}, {high:.3f}]"
