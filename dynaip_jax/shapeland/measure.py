"""How well subjects and prompts are kept, measured in Shapeland on identities and scenes that no model was trained on.

A *case* is a prompt, a close view of each of its subjects, and noise; all rows are measured on the same cases. CP and PF: see
`shapeland.scoring`; CP·PF is their product in each case.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dynaip_jax.errors import UserError
from dynaip_jax.eval import tables
from dynaip_jax.eval.tables import Difference, Row, make_row
from dynaip_jax.interrupts import at_stake
from dynaip_jax.sampling.opening import Described
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland import default
from dynaip_jax.shapeland.cases import batches, make_cases
from dynaip_jax.shapeland.draw import draw
from dynaip_jax.shapeland.scoring import Calibration, Scores, calibrate, scores
from dynaip_jax.shapeland.settings import ROWS, SUBJECTS, Setting
from dynaip_jax.shapeland.world import SIZE
from dynaip_jax.tasks import task


class Measured(NamedTuple):
    """The scores of one row with one number of subjects."""

    name: str
    subjects: int
    scores: Scores

    @property
    def row(self) -> Row:
        """Means and intervals."""
        return make_row(self.name, self.subjects, *self.scores)


def evaluate(
    pipe: DynaIPPipeline,
    judge_params: Any,
    rows: Sequence[str] | None = None,
    subjects: Sequence[int] = SUBJECTS,
    seed: int = 0,
    num: int = 256,
    progress: bool = False,
    calibrations: Mapping[int, Calibration] | None = None,
) -> list[Measured]:
    """Measures `rows` (names in `ROWS`; None: all that the pipeline can do) with each number of `subjects` they apply to, on
    `num` cases each.

    `calibrations`: of the judge by number of subjects, from `calibrate`; one that is missing is made.
    Raises `UserError` for rows that do not fit the pipeline.
    """
    names = check(pipe.model, rows, subjects)
    jobs = [(s, [name for name in names if s in ROWS[name].subjects]) for s in dict.fromkeys(subjects)]
    sampled = sum(ROWS[name].sampled for _, names in jobs for name in names)
    measured: list[Measured] = []

    def lost() -> str:
        total = sum(len(names) for _, names in jobs)
        return f"{len(measured)} of {total} rows were measured, and are lost"

    with task("sampling", sampled * len(list(batches(num))), "batch", progress) as done, at_stake(lost):
        for s, names in jobs:
            if not names:
                continue
            calibration = (calibrations or {}).get(s) or calibrate(judge_params, s)
            cases = make_cases(s, seed, num)
            for name in names:
                pictures = draw(pipe, cases, ROWS[name], seed, done)
                measured.append(Measured(name, s, scores(judge_params, pictures, cases, calibration)))
    return measured


def differences(measured: Sequence[Measured], against: str) -> list[Difference]:
    """How much each of `measured` is above the row `against` with as many subjects, case by case."""
    bases = {m.subjects: m.scores for m in measured if m.name == against}
    return [difference(m, against, bases[m.subjects]) for m in measured if m.name != against and m.subjects in bases]


def difference(one: Measured, against: str, other: Scores) -> Difference:
    """How much `one` is above the scores `other` of the row `against` on the same cases."""
    mine = one.scores
    apart = dict(cp=mine.cp - other.cp, pf=mine.pf - other.pf, cp_pf=mine.cp * mine.pf - other.cp * other.pf)
    found = tables.parts_of(apart)
    return Difference(
        name=one.name,
        against=against,
        subjects=one.subjects,
        n=len(mine.cp),
        cp=found["cp"],
        pf=found["pf"],
        cp_pf=found["cp_pf"],
        parts=tables.parts_of({name: value - other.parts[name] for name, value in mine.parts.items()}),
    )


def check(model: Described, rows: Sequence[str] | None, subjects: Sequence[int]) -> list[str]:
    """The names of `rows`, or of all that `model` can do, whose weights are not needed. Raises `UserError` for what it cannot."""
    height, width = (model.defaults[k] for k in ("height", "width"))
    if (height, width) != (SIZE, SIZE):
        raise UserError(
            f"`model` {model.bundle.path}: draws {width} x {height} pixels; expected a model of Shapeland, {SIZE} x {SIZE}; "
            "leave `model` out"
        )
    if rows is None:
        return [name for name, setting in ROWS.items() if _lacks(model, setting) is None]
    for name in rows:
        if name not in ROWS:
            raise UserError(f"`rows` {name}: no such row; expected some of {', '.join(ROWS)}")
        lack = _lacks(model, ROWS[name])
        if lack is not None:
            raise UserError(f"`rows` {name}: {lack}")
        if not set(ROWS[name].subjects) & set(subjects):
            raise UserError(
                f"`rows` {name}: is about {_listed(ROWS[name].subjects)} subjects, `subjects` {_listed(subjects)}; "
                "pass numbers that both have"
            )
    return list(dict.fromkeys(rows))


def retrained() -> list[Row]:
    """The stored rows of adapters that were trained differently. Empty if the package has no such file."""
    return json.loads(default.RETRAINED.read_text())["rows"] if default.RETRAINED.is_file() else []


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text, 95 % intervals in brackets."""
    return tables.table(rows, {name: setting.asks for name, setting in ROWS.items()})


def _lacks(model: Described, setting: Setting) -> str | None:
    """Why `model` cannot do a row; None if it can."""
    if setting.source != "adapter":
        return None
    if model.adapter is None:
        return "needs an adapter, and none is loaded; pass `adapter` DIR"
    if setting.double_only and model.adapter.blocks != "all":
        return "this adapter has no injection into single blocks that could be left out; leave the row out"
    return None


def _listed(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))
