"""Pictures are saved as they are done."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynaip_jax.sampling.pipeline import Generation

GRID_PIXELS = 100_000_000  # at most, of the grid of several pictures


class Saving:
    """Writes pictures with their settings as they are done, then the grid of several; prints the names, and knows what is lost.

    `outputs`: as from `naming.outputs`; `files`: what settings say of those that were given; `elsewhere`: whether a picture lies under
    another name.
    """

    def __init__(self, outputs: Sequence[str | Path], files: dict[str, Any], *, overwrite: bool):
        self._outputs, self._files, self._overwrite = outputs, files, overwrite
        self._singles = outputs[1:] or outputs
        self._cells: list[Any] = []
        self._seeds: list[int | None] = []
        self._settings: dict[str, Any] = {}
        self.elsewhere = False

    @property
    def done(self) -> int:
        """Pictures that are saved."""
        return len(self._cells)

    def lost(self) -> str:
        """What there will not be if the command ends now."""
        if self.done < len(self._singles):
            one = len(self._singles) == 1
            return (
                "the picture is lost"
                if one
                else f"{len(self._singles) - self.done} of {len(self._singles)} pictures are lost"
            )
        return "there is no grid" if len(self._outputs) > 1 else ""

    def add(self, part: Generation) -> None:
        """Saves some pictures."""
        from dynaip_jax import images

        self._settings = self._settings or part.settings | self._files
        for k, image in enumerate(part.images):
            own = part.settings_of(k) | self._files
            self._keep(image, self._singles[self.done], own)
            self._seeds.append(own["seed"])
            self._cells.append(images.cell(image, len(self._singles), GRID_PIXELS))

    def grid(self) -> None:
        """Saves the grid, if there are several pictures."""
        from dynaip_jax import images

        if len(self._outputs) > 1:
            self._keep(images.grid(self._cells), self._outputs[0], self._settings | dict(seed=self._seeds))

    def _keep(self, image: Any, path: str | Path, settings: dict[str, Any]) -> None:
        from dynaip_jax import images

        kept = images.keep_png(image, path, settings, overwrite=self._overwrite)
        if kept.reason is not None:
            self.elsewhere = True
            print(f"warning: {path}: cannot be written ({kept.reason}); saved as {kept.path}", file=sys.stderr)
        print_name(kept.path)


def print_name(path: Path) -> None:
    """Prints a name on stdout. That nobody reads it any more, or that it cannot be shown, stops nothing."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(str(path).encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # until the process ends
