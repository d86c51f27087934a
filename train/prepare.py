"""Pictures and captions on disk -> a dataset that training reads.

python -m train.prepare --source photos/metadata.jsonl --out data/photos
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dynaip_jax.commandline import argument, flag, parse, run_cli
from dynaip_jax.data import sources
from dynaip_jax.data.check import BadRow, Limits, check
from dynaip_jax.data.joining import join
from dynaip_jax.data.records import INDEX, Record, write_dataset
from dynaip_jax.data.sources import Source
from dynaip_jax.errors import UserError
from dynaip_jax.interrupts import at_stake
from dynaip_jax.storage.folders import AnyPath, as_path, replacing
from dynaip_jax.tasks import task
from train.parts import Part, Share, folder_of, make_parts

EXAMPLES = """
examples:
  python -m train.prepare --source photos/metadata.jsonl --out data/photos
  python -m train.prepare --source Subjects200K/ --format subjects200k --min-quality 5 --out data/subjects200k
  python -m train.prepare --source pictures/ --format folder --out data/pictures --skip-bad
"""


class Prepared(NamedTuple):
    """How many rows were written, and those that were left out."""

    written: int
    bad: list[BadRow]


def prepare(
    source: Source, out: AnyPath, limits: Limits, *, jobs: int = 1, skip_bad: bool = False, overwrite: bool = False
) -> Prepared:
    """Checks every row of `source`, in `jobs` threads, and writes the good ones as a dataset to the folder `out`.

    Each bad row is told on stderr as it is found. `out` appears whole or not at all. Raises `UserError` if a row is bad,
    once all have been checked, unless `skip_bad`; if none is good; and if `out` exists, unless `overwrite`.
    """
    bad: list[BadRow] = []

    def good() -> Iterator[Record]:
        from tqdm import tqdm

        number = 0
        with task("checking", source.entries, "row") as done:
            for checked in _checked(source, limits, jobs):
                done(checked.number - number)
                number = checked.number
                if isinstance(checked, BadRow):
                    bad.append(checked)
                    tqdm.write(f"row {checked.number}: {UserError(checked.reason).told(flag)}", file=sys.stderr)
                elif skip_bad or not bad:
                    yield checked
        if bad and not skip_bad:
            raise UserError(f"{len(bad)} bad rows, named above; nothing was written; correct them, or pass --skip-bad")

    with (
        at_stake(f"nothing is written to {out}"),
        replacing(out, overwrite=overwrite, marks=(INDEX,)) as work,
    ):
        return Prepared(write_dataset(work, good()), bad)


def prepare_in_parts(
    source: Source,
    out: AnyPath,
    limits: Limits,
    *,
    processes: int,
    share: Share | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> Prepared:
    """As `prepare`, in `processes` processes, each writing parts of its own, which are joined at the end.

    Finished parts stay until `out` is whole: the same call goes on after it was stopped or has found bad rows. `share`: of one of
    several hosts that see the same folders; nothing is joined then.
    """
    folder = folder_of(out)
    if share is not None:
        made = list(_told(make_parts(source, folder, limits, processes, share), source.entries))
        return Prepared(sum(part.written for part in made), [row for part in made for row in part.bad])
    with (
        at_stake(f"finished parts are kept in {folder}; run the same command to go on"),
        replacing(out, overwrite=overwrite, marks=(INDEX,)) as work,
    ):
        made = list(_told(make_parts(source, folder, limits, processes), source.entries))
        bad = [row for part in made for row in part.bad]
        if bad and not skip_bad:
            raise UserError(
                f"{len(bad)} bad rows, named above; no dataset was written, the good rows are kept in {folder}; correct the bad ones and run "
                "this again, or pass --skip-bad"
            )
        written = join(work, [part.folder for part in made if part.written])
    shutil.rmtree(folder, ignore_errors=True)
    return Prepared(written, bad)


def _told(parts: Iterable[Part], entries: int) -> Iterator[Part]:
    """The same, with the progress through `entries` rows and a line for each bad one."""
    from tqdm import tqdm

    number = 0
    with task("checking", entries, "row") as done:
        for part in parts:
            done(part.last - number)
            number = part.last
            for row in part.bad:
                tqdm.write(f"row {row.number}: {UserError(row.reason).told(flag)}", file=sys.stderr)
            yield part


def _checked(source: Source, limits: Limits, jobs: int) -> Iterator[Record | BadRow]:
    """Every row, checked, in order; only a few at a time are in memory."""
    waiting: deque[Future[Record | BadRow]] = deque()
    with ThreadPoolExecutor(jobs) as pool:
        for row in source.rows:
            if isinstance(row, BadRow):
                waiting.append(pool.submit(lambda bad: bad, row))
            else:
                waiting.append(pool.submit(check, row, limits))
            if len(waiting) > 2 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(frozen=True)
class Arguments:
    """Checks pictures and captions and writes them as a dataset (tensorflow-datasets, array_record)."""

    source: Path = argument("the layout's file or folder", unit="PATH")
    out: str = argument("the folder to write; it may be gs://BUCKET/FOLDER", unit="DIR")
    format: Literal["manifest", "subjects200k", "folder"] = argument("the layout", default="manifest")
    min_quality: int | None = argument(
        "subjects200k: leave out pairs with a quality score below N, from 0 to 5", default=None, usual=0, unit="N"
    )
    min_side: int = argument("smaller pictures are bad rows", default=Limits.min_side, unit="PIXELS")
    max_pixels: int = argument("larger pictures are bad rows", default=Limits.max_pixels, unit="N")
    shrink: int | None = argument(
        "reduce pictures whose shorter side is longer to this: photographs of many megapixels are slow to train on",
        default=None,
        usual="keep them as they are",
        unit="PIXELS",
    )
    jobs: int = argument("threads that decode", default=os.cpu_count() or 1, unit="N")
    processes: int | None = argument(
        "for large datasets: processes that check and write, and go on where they were stopped",
        default=None,
        usual="threads alone",
        unit="N",
    )
    share: str | None = argument(
        "with --processes: this host does part I of N; run it without once all have ended",
        default=None,
        usual="all",
        unit="I/N",
    )
    skip_bad: bool = argument("leave bad rows out, instead of stopping", default=False)
    overwrite: bool = argument("replace an existing dataset", default=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares a dataset; prints where it is and how many rows it has."""
    args = parse(Arguments, argv, "python -m train.prepare", f"\n{sources.__doc__}{EXAMPLES}")
    limits = Limits(args.min_side, args.max_pixels, args.shrink)
    if args.shrink is not None and args.format == "subjects200k":
        raise UserError(f"`shrink` {args.shrink}: expected another `format` than subjects200k, whose files are small")
    if args.jobs < 1:
        raise UserError(f"`jobs` {args.jobs}: expected at least 1")
    if args.processes is not None and not 1 <= args.processes <= 1024:
        raise UserError(f"`processes` {args.processes}: expected from 1 to 1024")
    if args.share is not None and args.processes is None:
        raise UserError(f"`share` {args.share}: expected `processes` with it; pass both")
    share = None if args.share is None else Share.parse(args.share)
    if args.min_quality is not None and (args.format != "subjects200k" or not 0 <= args.min_quality <= 5):
        raise UserError(
            f"`min_quality` {args.min_quality} with `format` {args.format}: expected 0 to 5, with `format` subjects200k"
        )

    match args.format:
        case "manifest":
            source = sources.read_manifest(args.source)
        case "subjects200k":
            source = sources.read_subjects200k(args.source, args.min_quality or 0)
        case "folder":
            source = sources.read_folder(args.source)
    for line in source.ignored:
        print(line, file=sys.stderr)
    choices: dict[str, Any] = dict(skip_bad=args.skip_bad, overwrite=args.overwrite)
    if args.processes is None:
        done = prepare(source, as_path(args.out), limits, jobs=args.jobs, **choices)
    else:
        done = prepare_in_parts(source, as_path(args.out), limits, processes=args.processes, share=share, **choices)
    left_out = f", {len(done.bad)} bad rows left out" if done.bad else ""
    if share is not None:
        print(
            f"{args.out}: part {share.number} of {share.hosts} is done, {done.written} rows{left_out}; run without --share to join all"
        )
        return 0
    print(f"{args.out}: {done.written} rows from {source.entries} entries of {args.source}{left_out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
