"""A run: the folder in which a set is drawn and measured, and what each step leaves in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dynaip_jax import images
from dynaip_jax.errors import UserError, reason
from dynaip_jax.jobs.rows import Job
from dynaip_jax.measuring.judge import Judge, Question, questions
from dynaip_jax.measuring.likeness import Likeness
from dynaip_jax.measuring.scores import Row, rounded
from dynaip_jax.measuring.sets import Case
from dynaip_jax.storage.locks import hold
from dynaip_jax.storage.renames import write_new

PICTURES, ANSWERS, LOCK, REPORT = "pictures", "judge.jsonl", ".evaluating", "report.html"


class Picture(NamedTuple):
    """A picture of a run: its case, its number among those of the case, and its file in the run's folder."""

    case: Case
    number: int
    file: str


@contextlib.contextmanager
def opened(run: Path) -> Iterator[None]:
    """The folder of a run, made if there is none, is this process's alone in the block. Raises `UserError` if it cannot be, or is
    another's."""

    def refusal(holder: str) -> UserError:
        return UserError(
            f"`out` {run}: {holder} evaluates there; expected a folder of its own; wait for it, or choose another"
        )

    try:
        (run / PICTURES).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"`out` {run}: cannot be made ({reason(e)}); expected a folder to write to; choose another"
        ) from e
    try:
        with hold(run / LOCK, refusal):
            yield
    finally:
        for folder in (run / PICTURES, run):  # where nothing came of it, nothing stays
            with contextlib.suppress(OSError):
                folder.rmdir()


def pictures(cases: Sequence[Case], each: int) -> list[Picture]:
    """`each` pictures of every case."""
    return [Picture(case, k, os.path.join(PICTURES, f"{case.name}_{k}.png")) for case in cases for k in range(each)]


def jobs(run: Path, wanted: Sequence[Picture], options: Mapping[str, Any]) -> list[Job]:
    """The generations of a run: picture k of a case has the seed of `options` + k. Masks of all subjects, or words of all, say where they
    are to appear."""
    made = []
    for n, (case, number, file) in enumerate(wanted, 1):
        masks = tuple(s.mask for s in case.subjects if s.mask)
        words = tuple(s.words for s in case.subjects)
        own = {name: value for name, value in options.items() if name not in ("num_images", "at_once")}
        made.append(
            Job(
                n,
                case.prompt,
                file,
                run,
                references=tuple(s.pictures[0] for s in case.subjects),
                masks=masks if len(masks) == len(case.subjects) else (),
                words=words if all(words) and len(words) > 1 and not masks else (),
                options=own | dict(seed=(options.get("seed") or 0) + number),
            )
        )
    return made


def asked_of_judge(run: Path, wanted: Sequence[Picture], *, drawn: bool = True) -> list[Question]:
    """All questions about some pictures, numbered from 0; unless all are `drawn`, about a reference in place of one that is not."""
    known: dict[str, Any] = {}
    found: list[Question] = []
    for n, (case, _, file) in enumerate(wanted):
        for subject in case.subjects:
            if subject.pictures[0] not in known:
                known[subject.pictures[0]] = images.load_image(subject.pictures[0])
        references = [known[s.pictures[0]] for s in case.subjects]
        there = drawn or (run / file).is_file()
        found += questions(case, n, images.load_image(run / file) if there else references[0], references)
    return found


def measured(
    run: Path,
    wanted: Sequence[Picture],
    likeness: Likeness,
    verdicts: Mapping[int, tuple[dict[str, float | None], dict[str, str]]],
    step: Callable[[], object] = lambda: None,
) -> list[Row]:
    """A row a picture. `verdicts`: the judge's scores and reasons, by the number of the picture."""
    rows = []
    for n, (case, number, file) in enumerate(wanted):
        scores = likeness.scores(case, images.load_image(run / file))
        judged, why = verdicts.get(n, ({}, {}))
        rows.append(Row(case.name, number, file, rounded(scores | judged), why))
        step()
    return rows


def judged(
    judge: Judge, asked: Sequence[Question], step: Callable[[], object]
) -> tuple[dict[int, tuple[dict[str, float | None], dict[str, str]]], int]:
    """The judge's scores and reasons, by the number of the picture, and how many answers were not to be had. CP is the mean over subjects; a
    picture of which a question is open has no CP or PF, and no CP·PF."""
    verdicts = judge.ask(asked, step)
    each: dict[int, dict[str, list[Any]]] = {}
    for question, verdict in zip(asked, verdicts, strict=True):
        each.setdefault(question.picture, {}).setdefault(question.measure, []).append(verdict)
    made = {}
    for n, by_measure in each.items():
        scores: dict[str, float | None] = {}
        for measure, found in by_measure.items():
            known = [v.score for v in found if v.score is not None]
            scores[measure.upper()] = sum(known) / len(known) if len(known) == len(found) else None
        cp, pf = scores.get("CP"), scores.get("PF")
        scores["CP·PF"] = None if cp is None or pf is None else cp * pf
        named = {f"{k.upper()}, {judge.endpoint.model}": v for k, v in scores.items()}
        made[n] = (named, {m.upper(): " ".join(v.reason for v in found) for m, found in by_measure.items()})
    return made, sum(verdict.lost for verdict in verdicts)


def written(path: Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all. Raises `UserError` if it cannot be, as on a full disk."""
    try:
        write_new(path, content)
    except OSError as e:
        raise UserError(
            f"{path}: cannot be written ({reason(e)}); pictures and answers are kept; free space, and run it again"
        ) from e
