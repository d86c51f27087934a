"""The settings in PNG files that this project wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynaip_jax.errors import UserError
from dynaip_jax.images.reading import opened
from dynaip_jax.images.writing import SETTINGS_KEY
from dynaip_jax.reading import parse_json


def read_settings(path: str | Path | bytes) -> dict[str, Any]:
    """The settings that `save_png` put into a PNG file, or into its content (bytes); its pixels are not read.

    Raises `UserError` for a file that is missing, not a PNG, or without such settings.
    """
    file = path if isinstance(path, bytes) else Path(path)
    path = "settings" if isinstance(path, bytes) else path
    with opened(file, str(path), ("PNG",), "a PNG made by dynaip") as picture:
        text = picture.info.get(SETTINGS_KEY)
    try:
        settings = parse_json(text.encode(), halves=True) if isinstance(text, str) else None
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds no settings; expected a PNG written by dynaip, unedited; use the original file")
    return settings
