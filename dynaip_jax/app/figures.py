"""Figures of commands: a PNG, and beside it the values that it shows."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaip_jax.errors import UserError, reason

if TYPE_CHECKING:
    from PIL import Image


def check(output: Path, suffixes: tuple[str, ...], *, overwrite: bool) -> None:
    """Raises `UserError` where the figure or what lies beside it, the same name with one of the `suffixes`, cannot be written; and
    where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib is missing; expected it for figures; pip install 'dynaip_jax[plot]'")
    from dynaip_jax import images

    images.check_png_path(output, overwrite=overwrite)
    for suffix in suffixes:
        beside = output.with_suffix(suffix)
        if os.path.lexists(beside) and not overwrite:
            raise UserError(
                f"{beside}: exists; expected a free name for the values; pass --overwrite, or another --output"
            )


def keep(picture: Image.Image, output: Path, settings: dict[str, Any], *, overwrite: bool) -> Path:
    """Writes the figure, under another name where it has to be, which is said. Prints its name and returns it."""
    from dynaip_jax import images

    kept = images.keep_png(picture, output, settings, overwrite=overwrite)
    if kept.reason is not None:
        print(f"warning: {output}: cannot be written ({kept.reason}); saved as {kept.path}", file=sys.stderr)
    print(kept.path)
    return kept.path


def beside(figure: Path, suffix: str, values: bytes) -> None:
    """Writes the values of a `figure` under its name with another `suffix`, and prints that. Raises `UserError` if it cannot."""
    from dynaip_jax.storage.renames import write_new

    path = figure.with_suffix(suffix)
    try:
        write_new(path, values)
    except OSError as e:
        raise UserError(
            f"{path}: cannot be written ({reason(e)}); the figure is there, the values are not; free space and draw it again"
        ) from e
    print(path)
