"""The report of a run: one HTML file that needs no other, with a table and every picture beside its references, the worst first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dynaip_jax import images
from dynaip_jax.errors import UserError
from dynaip_jax.measuring.judge import data_uri
from dynaip_jax.measuring.scores import LOWER, Mean, Row, Scores, bracket, means, worst_first
from dynaip_jax.measuring.sets import Case

SIDE, REFERENCE_SIDE, QUALITY = 320, 160, 80  # pixels of pictures and of references, and how well they are kept
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
article { border-top: 1px solid #8886; padding: 1rem 0; }
h2 { font-size: 1.05rem; margin: 0 0 .6rem; font-weight: 600; }
.row { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-start; }
figure { margin: 0; } figcaption { font-size: .8rem; opacity: .75; max-width: 20rem; overflow-wrap: anywhere; }
.made { width: 20rem; max-width: 100%; } .given { width: 10rem; height: 10rem; background: center / contain no-repeat; }
.references { max-width: 21rem; }
.better { color: #17803d; } .worse { color: #c0392b; }
dl { display: grid; grid-template-columns: max-content max-content; gap: .1rem .8rem; margin: 0; font-size: .85rem; }
dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; } p.why { font-size: .85rem; max-width: 50rem; }
@media (prefers-color-scheme: dark) { .references { max-width: 21rem; }
.better { color: #5fd08a; } .worse { color: #ff8a7a; } }
"""


def report(
    run: Path,
    own: Scores,
    cases: Mapping[str, Case],
    notes: Sequence[str],
    against: tuple[Path, Scores] | None = None,
) -> bytes:
    """The file. `run`: the folder of its pictures; `cases`: by name; `notes`: lines worth showing; `against`: another run of the same set.

    A picture that is missing there is left out and said so. All text is escaped: prompts are somebody else's.
    """
    files = list(dict.fromkeys(file for case in cases.values() for s in case.subjects for file in s.pictures))
    classes = {file: f"r{n}" for n, file in enumerate(files)}
    other = None if against is None else against[1]
    found = means(own, other)
    others = {} if against is None else {(row.case, row.number): (against[0], row) for row in against[1].rows}
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{_text(run.name)}</title><style>{STYLE}{''.join(_classes(classes))}</style></head><body>",
        f"<h1>{_text(run.name)}: {_text(own.name)}, {len(cases)} prompts, {len(own.rows)} pictures</h1>",
        _settings(own.settings),
        *(f"<p><strong>Note:</strong> {_text(note)}</p>" for note in notes),
        ""
        if against is None
        else f"<p>Compared with {_text(against[0])}: differences are this run minus that one.</p>",
        _table(found),
        "<p>Brackets are 95 % bootstrap intervals over prompts. Worst pictures first, by the mean of their ranks.</p>",
    ]
    columns = [mean.column for mean in found]
    for row in worst_first(own.rows, columns):
        parts.append(_article(run, row, cases[row.case], classes, columns, others.get((row.case, row.number))))
    parts.append("</body></html>\n")
    return "".join(parts).encode()


def _classes(classes: Mapping[str, str]) -> Iterator[str]:
    """Each reference once, as a background that many figures share."""
    for file, name in classes.items():
        try:
            address = data_uri(images.load_image(file), REFERENCE_SIDE, QUALITY)
        except UserError:
            continue
        yield f".{name} {{ background-image: url({address}); }}\n"


def _settings(settings: Mapping[str, Any]) -> str:
    told = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    return f"<p>{_text(told)}</p>"


def _table(found: Sequence[Mean]) -> str:
    compared = any(mean.other is not None for mean in found)
    head = ["measure", "prompts", "mean", "95 %", *(("other", "difference", "95 %") if compared else ())]
    rows = ["<tr>" + "".join(f'<th scope="col">{_text(name)}</th>' for name in head) + "</tr>"]
    for mean in found:
        cells = [mean.column, str(mean.cases), f"{mean.mean:.4f}", bracket(mean.interval)]
        if mean.difference is not None:
            cells += [f"{mean.other:.4f}", f"{mean.difference:+.4f}", bracket(mean.difference_interval)]
        rows.append(f'<tr class="{_side(mean)}">' + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _side(mean: Mean) -> str:
    """Whether the difference is one: its interval does not hold 0."""
    if mean.difference_interval is None or mean.difference_interval[0] <= 0 <= mean.difference_interval[1]:
        return "alike"
    assert mean.difference is not None
    return "better" if (mean.difference > 0) != (mean.column in LOWER) else "worse"


def _article(
    run: Path,
    row: Row,
    case: Case,
    classes: Mapping[str, str],
    columns: Sequence[str],
    other: tuple[Path, Row] | None,
) -> str:
    made = [_made(run, row, "this run", case)]
    if other is not None:
        made.append(_made(*other, "the other run", case))
    given = [
        f'<figure><div class="given {classes[file]}" role="img" aria-label="reference {_text(subject.words)}"></div>'
        f"<figcaption>{_text(subject.words or Path(file).name)}</figcaption></figure>"
        for subject in case.subjects
        for file in subject.pictures
    ]
    scores = "".join(_score(name, row, None if other is None else other[1]) for name in columns)
    why = "".join(f'<p class="why">{_text(name)}: {_text(said)}</p>' for name, said in row.reasons.items() if said)
    return (
        f'<article><h2>{_text(case.prompt)}</h2><div class="row">{"".join(made)}<div class="row references">{"".join(given)}</div>'
        f"<dl>{scores}</dl></div>{why}</article>"
    )


def _score(name: str, row: Row, other: Row | None) -> str:
    """A column's score of a picture, and of the other run's, if it has one."""
    values = [each.scores.get(name) for each in (row, other) if each is not None]
    if values[0] is None:
        return ""
    told = " against ".join("none" if x is None else f"{x:.4f}" for x in values)
    return f"<dt>{_text(name)}</dt><dd>{told}</dd>"


def _made(run: Path, row: Row, whose: str, case: Case) -> str:
    label = f"{whose}, {row.case}, picture {row.number}"
    try:
        address = data_uri(images.load_image(run / row.file), SIDE, QUALITY)
    except UserError as e:
        return f"<figure><p>{_text(label)}: {_text(e)}</p></figure>"
    return f'<figure><img class="made" alt="{_text(case.prompt)}" src="{address}"><figcaption>{_text(label)}</figcaption></figure>'


def _text(value: object) -> str:
    return escape(str(value).encode(errors="backslashreplace").decode(), quote=True)
