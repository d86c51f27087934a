"""`dynaip evaluate set`: draws a set of subjects and prompts, measures the pictures, and writes a report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaip_jax.app.opening import Loading, open_for
from dynaip_jax.app.options import given_options, with_options
from dynaip_jax.commandline import argument, parse
from dynaip_jax.errors import UserError
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.tasks import task

if TYPE_CHECKING:
    from dynaip_jax.measuring.judge import Judge
    from dynaip_jax.measuring.likeness import Likeness
    from dynaip_jax.measuring.runs import Picture
    from dynaip_jax.measuring.scores import Scores
    from dynaip_jax.measuring.sets import Set

PROG = "dynaip evaluate set"
EXAMPLES = """
examples:
  dynaip evaluate set dreambooth/dataset --model bundles/flux-dev --adapter adapters/mine --out runs/mine \\
      --clip measures/clip-b32 --dino measures/dino-s16 --num-images 4
      DreamBench: every picture, CLIP-I, CLIP-T, DINO-I, and a report; the same command goes on where it was stopped
  dynaip evaluate set dreambench_plus/ --model bundles/flux-dev --adapter adapters/mine --out runs/plus \\
      --clip measures/clip-b32 --dino measures/dino-s8 --judge-url https://server/v1 --judge-model NAME --judge-price 2.5 10 --dry-run
      DreamBench++ with CP and PF by a vision model; --dry-run says what that would draw, ask and cost
  dynaip evaluate set my.jsonl --out runs/b --dino measures/dinov2-s14 --against runs/a
      a set of your own, compared with another run of it
"""
JUDGING, MEASURING = "judge", "set and measures"  # headings in help
MOST_REPEATS, MOST_AT_ONCE, CHUNK = 100, 64, 32


@dataclass(frozen=True)
class Arguments(Loading):
    """Draws every prompt of a set with its subjects, measures how well both are kept, and writes scores.json and report.html into the
    folder --out. A set is DreamBench's folder, DreamBench++'s, or a list of your own: a JSON line a prompt, such as
    {"prompt": "a cup and a dog", "references": ["cup.jpg", "dog.jpg"], "words": ["cup", "dog"]}."""

    set: Path = argument("a folder, or a list", unit="SET", positional=True)
    out: Path = argument("the folder of pictures, answers, scores and the report", unit="RUN", group=MEASURING)
    limit: int | None = argument("so many prompts alone, evenly taken", default=None, unit="N", group=MEASURING)
    clip: tuple[str, ...] = argument("a converted CLIP", default=(), unit="MEASURE", group=MEASURING, repeat=True)
    dino: tuple[str, ...] = argument(
        "a converted DINO or DINOv2; the last one also tells which of several subjects have collapsed",
        default=(),
        unit="MEASURE",
        group=MEASURING,
        repeat=True,
    )
    against: Path | None = argument(
        "another run of the same set, to compare with", default=None, unit="RUN", group=MEASURING
    )
    overwrite: bool = argument("draw pictures anew that were made otherwise", default=False, group=MEASURING)
    dry_run: bool = argument("say what would be drawn, asked and paid; do nothing", default=False, group=MEASURING)

    judge_url: str | None = argument(
        "an OpenAI-compatible server, which gets the pictures; its key is read from DYNAIP_JUDGE_KEY alone",
        default=None,
        unit="URL",
        group=JUDGING,
    )
    judge_model: str | None = argument("the vision model there", default=None, unit="NAME", group=JUDGING)
    judge_repeats: int = argument("ask each question so often", default=1, unit="N", group=JUDGING)
    judge_at_once: int = argument("questions at once", default=4, unit="N", group=JUDGING)
    judge_timeout: float = argument("seconds that an answer may take", default=120.0, unit="S", group=JUDGING)
    judge_price: tuple[float, ...] = argument(
        "of a million tokens in and out, for an estimate", default=(0.0, 0.0), unit="IN OUT", group=JUDGING
    )


def main(argv: Sequence[str]) -> int:
    """Draws, measures and reports; prints the table and the report's name."""
    args: Any = parse(with_options(Arguments), argv, PROG, EXAMPLES)
    given = given_options(args)
    options = SampleOptions(**given)
    options.seeds()
    _check(args)

    from dynaip_jax.measuring import runs
    from dynaip_jax.measuring.scores import read_scores
    from dynaip_jax.measuring.sets import chosen, read_set

    whole = read_set(args.set)
    found = whole._replace(cases=chosen(whole.cases, args.limit))
    for note in found.notes:
        print(f"warning: {note}", file=sys.stderr)
    wanted = runs.pictures(found.cases, options.num_images or 1)
    other = None if args.against is None else read_scores(args.against)
    with runs.opened(args.out):
        judge, likeness = _judge(args), _likeness(args)
        scored = _blank(args, given, found, wanted)
        if other is not None:
            _comparable(scored, other, args.against)
        if not _draw(args, given, wanted):
            _tell_cost(args, judge, wanted)
            return 0
        scored = _measure(args, scored, wanted, judge, likeness)
        if other is not None:
            _comparable(scored, other, args.against)
        _write(args, scored, other, found)
    return 0


def _check(args: Any) -> None:
    """Raises `UserError` for what does not fit each other, whatever the set is."""
    if (args.judge_url is None) != (args.judge_model is None):
        lacks = "judge_model" if args.judge_model is None else "judge_url"
        raise UserError(f"`{lacks}`: missing; expected the judge's server and its model; give both, or neither")
    for name, value, most in (
        ("judge_repeats", args.judge_repeats, MOST_REPEATS),
        ("judge_at_once", args.judge_at_once, MOST_AT_ONCE),
    ):
        if not 1 <= value <= most:
            raise UserError(f"`{name}` {value}: expected at least 1, and at most {most}")
    if not 0 < args.judge_timeout <= 3600:
        raise UserError(f"`judge_timeout` {args.judge_timeout}: expected seconds above 0, at most 3600")
    if len(args.judge_price) != 2 or not all(0 <= price < 1e6 for price in args.judge_price):
        raise UserError("`judge_price`: expected two prices, of a million tokens in and out, such as 2.5 10")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"`limit` {args.limit}: expected at least 1")
    if args.model is not None and args.adapter is None:
        raise UserError("`adapter`: missing; a set has reference pictures, which an adapter reads; pass --adapter DIR")


def _blank(args: Any, given: dict[str, Any], found: Set, wanted: Sequence[Picture]) -> Scores:
    """Scores without any measure: what the run is of."""
    from dynaip_jax.measuring.scores import Row, Scores

    settings = dict(model=args.model, adapter=args.adapter) | {k: _plain(v) for k, v in sorted(given.items())}
    rows = [Row(picture.case.name, picture.number, picture.file, {}, {}) for picture in wanted]
    return Scores(found.fingerprint(), found.name, settings, rows)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _comparable(own: Scores, other: Scores, path: Path) -> None:
    from dynaip_jax.measuring.scores import check_comparable

    check_comparable(own, other, path)


def _judge(args: Any) -> Judge | None:
    from dynaip_jax.measuring import runs
    from dynaip_jax.measuring.client import Cache, Endpoint
    from dynaip_jax.measuring.judge import Judge

    if args.judge_url is None:
        return None
    endpoint = Endpoint.of(args.judge_url, args.judge_model, args.judge_timeout)
    return Judge(endpoint, Cache(args.out / runs.ANSWERS), args.judge_repeats, args.judge_at_once)


def _draw(args: Any, given: dict[str, Any], wanted: Sequence[Picture]) -> bool:
    """Draws what is missing; False, with only what would be drawn said, for a dry run. Raises `UserError` if a picture cannot be drawn."""
    from dynaip_jax.jobs.planning import make_plan
    from dynaip_jax.jobs.running import Drawing
    from dynaip_jax.measuring import runs

    opened = open_for(args, True)
    with task("checking the set"):
        plan = make_plan(opened, runs.jobs(args.out, wanted, given), args.overwrite)
    _raise_first(plan.failures, wanted)
    for note in dict.fromkeys(note for one in plan.planned for note in one.notes):
        print(f"warning: {note}", file=sys.stderr)
    print(f"{plan.pictures} pictures, {plan.missing} of them to be drawn", file=sys.stderr)
    if args.dry_run:
        return False
    at_once = given.get("at_once") or given.get("num_images")
    _raise_first(Drawing(opened, plan, overwrite=args.overwrite, at_once=at_once).run(), wanted)
    return True


def _raise_first(failures: dict[int, UserError], wanted: Sequence[Picture]) -> None:
    if failures:
        first = min(failures)
        case = wanted[first - 1].case
        raise UserError(f"{case.name} ({len(failures)} pictures cannot be drawn): {failures[first].args[0]}")


def _tell_cost(args: Any, judge: Judge | None, wanted: Sequence[Picture]) -> None:
    """What the judge would be asked, and what that may cost."""
    from dynaip_jax.measuring import runs

    if judge is None:
        return
    asked = answered = tokens_in = tokens_out = 0
    price = 0.0
    for at in range(0, len(wanted), CHUNK):
        cost = judge.cost(runs.asked_of_judge(args.out, wanted[at : at + CHUNK], drawn=False))
        asked, answered = asked + cost.asked, answered + cost.answered
        tokens_in, tokens_out = tokens_in + cost.input_tokens, tokens_out + cost.output_tokens
        price += cost.price(args.judge_price)
    told = f", about {price:.2f}" if any(args.judge_price) else ""
    print(
        f"{asked} questions, {answered} of them answered; about {tokens_in} tokens in and {tokens_out} out for the rest{told}",
        file=sys.stderr,
    )


def _likeness(args: Any) -> Likeness:
    """The networks, read before anything is drawn."""
    from dynaip_jax.measuring.likeness import Likeness
    from dynaip_jax.measuring.networks import ClipMeasure, DinoMeasure

    return Likeness([*map(ClipMeasure, args.clip), *map(DinoMeasure, args.dino)])


def _measure(args: Any, scored: Scores, wanted: Sequence[Picture], judge: Judge | None, likeness: Likeness) -> Scores:
    from dynaip_jax.measuring import runs

    verdicts: dict[int, Any] = {}
    lost = 0
    if judge is not None:
        _tell_cost(args, judge, wanted)
        count = sum(len(picture.case.subjects) + 1 for picture in wanted)
        with task("judging", count, "question") as step:
            for at in range(0, len(wanted), CHUNK):
                asked = runs.asked_of_judge(args.out, wanted[at : at + CHUNK])
                found, more = runs.judged(judge, asked, step)
                lost += more
                verdicts |= {at + n: verdict for n, verdict in found.items()}
    with task("measuring", len(wanted), "picture") as step:
        rows = runs.measured(args.out, wanted, likeness, verdicts, step)
    if lost:
        print(
            f"warning: the judge left {lost} questions without a score; run it again to ask them anew", file=sys.stderr
        )
    return scored._replace(rows=rows)


def _write(args: Any, scored: Scores, other: Scores | None, found: Set) -> None:
    """Writes scores and report; prints the table."""
    from dynaip_jax.measuring import runs, scores
    from dynaip_jax.measuring.report import report

    runs.written(args.out / scores.FILE, scored.as_json())
    against = None if other is None else (args.against, other)
    with task("writing the report"):
        content = report(args.out, scored, {case.name: case for case in found.cases}, found.notes, against)
    runs.written(args.out / runs.REPORT, content)
    if scored.columns:
        print(scores.table(scores.means(scored, other)))
    print(args.out / runs.REPORT)
