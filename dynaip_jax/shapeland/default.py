"""Where the models of Shapeland lie that come with the package. `train.shapeland` trained them."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets" / "shapeland"
JUDGE = ASSETS / "judge.safetensors"
RETRAINED = ASSETS / "retrained.json"  # rows of adapters that were trained differently


def paths() -> tuple[Path, Path]:
    """The bundle's and the adapter's folder."""
    return ASSETS / "bundle", ASSETS / "adapter"
