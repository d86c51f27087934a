"""`dynaip sample --jobs`: a list of generations, one a line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dynaip_jax.app.opening import open_for
from dynaip_jax.app.saving import print_name
from dynaip_jax.errors import UserError
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.tasks import task

OF_LINES = (
    "prompt", "output", "reference", "subject", "mask", "native_reference", "noise", "noise_row", "random_seed", "like",
)  # fmt: skip


def main(args: Any, given: Mapping[str, Any]) -> int:
    """Draws the list; prints the name of each file. `given`: options of lines that do not have them.

    Raises `UserError` for a list or a model that cannot be used at all, if another process draws the list, and, once the others are
    done, if lines failed.
    """
    for name in OF_LINES:
        if getattr(args, name) not in (None, False, ()):
            raise UserError(f"`{name}`: each line of `jobs` says its own; leave it out, or write it into the lines")
    SampleOptions(**given)
    with _alone(args.jobs):
        return _draw(args, given)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """The list is this process's in the block: two that draw it would draw every picture twice. A folder that cannot be written to has no
    lock."""
    from dynaip_jax.storage.locks import hold

    def refusal(holder: str) -> UserError:
        return UserError(f"`jobs` {path}: {holder} draws it; expected a list of its own; wait for it, or copy the list")

    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            held.enter_context(hold(path.with_name(f".{path.name}.lock"), refusal))
        yield


def _draw(args: Any, given: Mapping[str, Any]) -> int:
    from dynaip_jax.jobs.planning import make_plan
    from dynaip_jax.jobs.rows import read_jobs
    from dynaip_jax.jobs.running import Drawing

    jobs, failures = read_jobs(args.jobs, {name: value for name, value in given.items() if name != "at_once"})
    opened = open_for(args, any(job.references for job in jobs))
    with task(f"checking {args.jobs}"):
        plan = make_plan(opened, jobs, args.overwrite)
    failures |= plan.failures
    for note in opened.notes:
        print(f"warning: {note}", file=sys.stderr)
    for one in plan.planned:
        for note in one.notes:
            print(f"warning: line {one.job.line}: {note}", file=sys.stderr)
    _tell(failures)
    if kept := plan.pictures - plan.missing:
        print(f"{kept} of {plan.pictures} pictures are there already", file=sys.stderr)
    late = Drawing(opened, plan, overwrite=args.overwrite, at_once=given.get("at_once"), told=print_name).run()
    _tell(late)
    if failed := len(failures | late):
        raise UserError(
            f"`jobs` {args.jobs}: {failed} of {len(jobs) + len(failures.keys() - {job.line for job in jobs})} lines failed, the first is "
            f"line {min(failures | late)}; the others are done; mend them and run it again"
        )
    return 0


def _tell(failures: Mapping[int, UserError]) -> None:
    for line, error in sorted(failures.items()):
        print(f"line {line}: {error.told(lambda name: name)}", file=sys.stderr)
