"""The backbone families, by the names they have on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynaip_jax.families.base import REFERENCE_ENCODER, Family, Preset
from dynaip_jax.families.flux import Flux1
from dynaip_jax.families.flux2 import Flux2Klein
from dynaip_jax.layers.compute import Compute
from dynaip_jax.storage.bundle import Bundle
from dynaip_jax.storage.codec import to_dict

FAMILIES: dict[str, type[Family]] = {family.name: family for family in (Flux1, Flux2Klein)}


def open_bundle(path: str | Path) -> Bundle:
    """The bundle in a folder. Raises `UserError` if it is none, or of a family that is not known."""
    return Bundle.open(path, tuple(FAMILIES))


def family_of(
    bundle: Bundle, compute: Compute = Compute(), *, reference: bool = True, encoder: str = REFERENCE_ENCODER
) -> Family:
    """The family of a bundle, at its sizes; see `Family.of`."""
    return FAMILIES[bundle.manifest["family"]].of(bundle, compute, reference=reference, encoder=encoder)


def published(name: str) -> Bundle | None:
    """A bundle without weights, in the published sizes of a model such as "flux-dev"; None for a name that no family has."""
    for family in FAMILIES.values():
        if name in family.presets:
            return Bundle(Path(name), manifest_of(family.name, family.presets[name]()))
    return None


def manifest_of(family: str, preset: Preset) -> dict[str, Any]:
    """What `bundle.json` says of a published model."""
    return dict(
        family=family,
        fingerprint="",
        components={name: dict(config=to_dict(config)) for name, config in preset.configs.items()},
        schedule=dict(preset.schedule),
        text=dict(preset.text),
        defaults=dict(preset.defaults),
    )
