"""What is to be drawn for a list of jobs: checked before any weights are read, without what lies there already."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dynaip_jax import images
from dynaip_jax.errors import UserError
from dynaip_jax.jobs.rows import Job
from dynaip_jax.sampling.batches import alike, settings_of, shape
from dynaip_jax.sampling.opening import Opened
from dynaip_jax.sampling.request import Request

# Settings that do not tell a picture from another: known only once it is drawn, or names of files whose content others tell.
APART = ("routing", "cached_steps", "model", "adapter", "lora", "reference", "mask", "native_reference", "noise")


class Planned(NamedTuple):
    """A job that fits: its pictures' files, the grid's (None: there is a single picture), and which pictures are to be drawn yet."""

    job: Job
    singles: list[Path]
    grid: Path | None
    missing: frozenset[int]
    shape: Hashable
    alike: Hashable
    notes: list[str]


class Plan(NamedTuple):
    """All jobs that fit, in the order of their lines, and what is wrong with the others, by line."""

    planned: list[Planned]
    failures: dict[int, UserError]

    @property
    def missing(self) -> int:
        """Pictures that are to be drawn."""
        return sum(len(one.missing) for one in self.planned)

    @property
    def pictures(self) -> int:
        """All pictures of jobs that fit."""
        return sum(len(one.singles) for one in self.planned)


def make_plan(opened: Opened, jobs: Iterable[Job], overwrite: bool) -> Plan:
    """Checks jobs against an opened model and against what lies at their outputs. A picture that the very job made is kept; another one
    is replaced if `overwrite`, and otherwise fails the job."""
    planned, failures = [], {}
    taken: dict[str, int] = {}
    for job in jobs:
        try:
            planned.append(_planned(opened, job, taken, overwrite))
        except UserError as e:
            failures[job.line] = e
    return Plan(planned, failures)


def _planned(opened: Opened, job: Job, taken: dict[str, int], overwrite: bool) -> Planned:
    request = job.request(opened.model)
    outputs = [Path(name) for name in job.outputs(request)]
    for path in outputs:
        other = taken.setdefault(os.path.abspath(path), job.line)
        if other != job.line:
            raise UserError(f"`output` {path}: line {other} writes it too; expected a name of its own; change one")
    singles = outputs[1:] or outputs
    images.check_png_path(outputs[0], overwrite=True)
    missing = frozenset(
        k for k, path in enumerate(singles) if not _lies(path, settings_of(shared(opened), request, k), overwrite)
    )
    grid = outputs[0] if len(outputs) > 1 else None
    if grid is not None:
        _lies(grid, grid_settings(shared(opened), request), overwrite)
    return Planned(job, singles, grid, missing, shape(request), alike(request), request.notes)


def shared(opened: Opened) -> dict[str, Any]:
    """What the settings of all pictures of a model say."""
    return dict(opened.settings)


def grid_settings(shared: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """What the grid of a call's pictures says, but for routing and steps from a cache."""
    first = settings_of(dict(shared), request, 0)
    kept = {name: value for name, value in first.items() if name != "noise_row"}
    seeds = None if request.seeds is None else request.seeds * len(request.prompts)
    own = dict(prompt=request.prompt, seed=[None] * len(request) if seeds is None else seeds)
    if request.noise is not None:
        own["noise_fingerprint"] = [images.digest(row) for row in request.noise]
    return kept | own


def is_made(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the PNG at `path` says that it was made with these settings."""
    try:
        found = images.read_settings(path)
    except UserError:
        return False
    names = settings.keys() - set(APART)
    plain = json.loads(json.dumps({name: settings[name] for name in names}))
    return all(name in found and found[name] == value for name, value in plain.items())


def _lies(path: Path, settings: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether the picture lies there. Raises `UserError` if something else does that may not be replaced."""
    if not os.path.lexists(path):
        return False
    if is_made(path, settings):
        return True
    if not overwrite:
        raise UserError(
            f"`output` {path}: exists, and was not made by this line as it is now; expected a free name; change it, or pass `overwrite`"
        )
    return False
