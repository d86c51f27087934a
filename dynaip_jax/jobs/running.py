"""Draws what a plan lacks: batch by batch, one compiled program a shape, each picture saved when it is done.

Which pictures make a batch depends on the whole list and not on what is done already, so that a list that was stopped ends with the
same bytes as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dynaip_jax import images, interrupts
from dynaip_jax.errors import OutOfMemory, UserError
from dynaip_jax.jobs.planning import Plan, Planned, grid_settings, is_made, shared
from dynaip_jax.sampling.batches import Asked, draw_together
from dynaip_jax.sampling.opening import Opened
from dynaip_jax.sampling.options import MOST
from dynaip_jax.sampling.pipeline import DynaIPPipeline, Generation
from dynaip_jax.tasks import task

GRID_PIXELS = 100_000_000  # at most, of the grid of several pictures
ROUTED = ("routing", "cached_steps")


class Place(NamedTuple):
    """A picture of a plan."""

    planned: Planned
    number: int

    @property
    def missing(self) -> bool:
        return self.number in self.planned.missing


class Drawing:
    """What is drawn of a plan, and what fails. `at_once`: pictures of a batch (None: as many as a line of that shape has at most);
    `told`: called with each file that is written."""

    def __init__(
        self,
        opened: Opened,
        plan: Plan,
        *,
        overwrite: bool = False,
        at_once: int | None = None,
        told: Callable[[Path], object] = lambda path: None,
    ):
        self._opened, self._plan, self._overwrite, self._at_once, self._told = opened, plan, overwrite, at_once, told
        self.failures: dict[int, UserError] = {}
        self.done = 0

    @cached_property
    def _pipe(self) -> DynaIPPipeline:
        """The model, whose weights are read when the first picture is to be drawn."""
        with task(f"loading {self._opened.model.bundle.path}"):
            return DynaIPPipeline.read(self._opened)

    def run(self) -> dict[int, UserError]:
        """Draws all that is missing; what is wrong with jobs that fail, by line. Raises `UserError` for what ends all, such as a full disk;
        what is drawn by then is saved, and the same call goes on with the rest."""
        total = self._plan.missing
        with task("drawing", total, "picture", show=total > 0) as step, interrupts.at_stake(self.left):
            for shape in dict.fromkeys(one.shape for one in self._plan.planned):
                members = [one for one in self._plan.planned if one.shape == shape]
                self._draw_shape(members, step)
        return self.failures

    def left(self) -> str:
        """What there is to be drawn yet, for who is interrupted."""
        missing = self._plan.missing - self.done
        return f"{missing} pictures are not drawn; the same command goes on with them" if missing else ""

    def _draw_shape(self, members: Sequence[Planned], step: Callable[..., object]) -> None:
        count = self._at_once or max(_at_once(one) for one in members)
        count = min(count, sum(len(one.singles) for one in members))
        for alike in dict.fromkeys(one.alike for one in members):
            places = [Place(one, k) for one in members if one.alike == alike for k in range(len(one.singles))]
            at = 0
            while at < len(places):
                batch = places[at : at + count]
                try:
                    if any(place.missing for place in batch):
                        self._draw_batch(batch, count, step)
                except OutOfMemory:
                    count = _smaller(count)
                    continue
                at += len(batch)
            for one in members:
                if one.alike == alike:
                    self._finish(one)

    def _draw_batch(self, batch: Sequence[Place], count: int, step: Callable[..., object]) -> None:
        """Draws a batch of `count` pictures, filled up with its last one, and saves those that are missing."""
        asked = list(self._asked(batch))
        if not asked:
            return
        padded = [one for _, one in asked] + [asked[-1][1]] * (count - len(asked))
        with self._pipe.within_memory(padded[0].request, raw=count > 1):
            drawn = draw_together(self._pipe, padded)
        if any(one is None for one in drawn) and (reason := self._pipe.not_finite()).field is None:
            raise reason  # weights are not finite: nothing can be drawn
        with interrupts.finishing():
            for (place, _), one in zip(asked, drawn, strict=False):
                if place.missing:
                    self._save(place, one)
                    step()

    def _asked(self, batch: Sequence[Place]) -> Iterator[tuple[Place, Asked]]:
        """The pictures whose files can be read now."""
        requests: dict[int, Any] = {}
        for place in batch:
            job = place.planned.job
            if job.line not in requests:
                try:
                    requests[job.line] = job.request(self._opened.model)
                except UserError as e:
                    self.failures[job.line], requests[job.line] = e, None
            if requests[job.line] is not None:
                yield place, Asked(requests[job.line], place.number)

    def _save(self, place: Place, drawn: Generation | None) -> None:
        job, path = place.planned.job, place.planned.singles[place.number]
        if drawn is None:
            self.failures[job.line] = self._pipe.not_finite()
            return
        settings = drawn.settings_of(0) | job.files
        if not is_made(path, settings):  # another process may draw the same list
            images.save_png(drawn.images[0], path, settings, overwrite=self._overwrite)
        self.done += 1
        self._told(path)

    def _finish(self, planned: Planned) -> None:
        """Writes the grid of a job whose pictures are all there."""
        if planned.grid is None or planned.job.line in self.failures:
            return
        request = planned.job.request(self._opened.model)
        settings = grid_settings(shared(self._opened), request) | planned.job.files
        if is_made(planned.grid, settings):
            return
        cells = []
        for path in planned.singles:
            with Image.open(path) as picture:
                cells.append(images.cell(picture.convert("RGB"), len(planned.singles), GRID_PIXELS))
        first = images.read_settings(planned.singles[0])
        settings |= {name: first[name] for name in ROUTED if name in first}
        images.save_png(images.grid(cells), planned.grid, settings, overwrite=self._overwrite)
        self._told(planned.grid)


def _at_once(planned: Planned) -> int:
    """Pictures that a job asks to have at once: as it says, or all of a prompt."""
    prompts = 1 if isinstance(planned.job.prompt, str) else len(planned.job.prompt)
    return min(planned.job.options.get("at_once") or MOST, len(planned.singles) // prompts)


def _smaller(count: int) -> int:
    """The next smaller number of pictures that `count` is a multiple of, so that later batches begin where they would have begun."""
    return next(n for n in range(count // 2, 0, -1) if count % n == 0)
