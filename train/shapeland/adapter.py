"""Stage `adapter`: the adapter on scenes of one subject, the base frozen."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from dynaip_jax.families.registry import open_bundle
from dynaip_jax.shapeland import default
from dynaip_jax.storage.adapter import read_adapter_manifest
from dynaip_jax.storage.folders import replacing
from dynaip_jax.storage.manifest import ADAPTER_FILE, MANIFESTS, write_manifest
from train.export import export
from train.shapeland.configs import ADAPTER, with_steps
from train.shapeland.runs import run
from train.shapeland.workdir import SHIPPED

MORE = 800  # steps of an adapter that is not fresh


def train_adapter(folder: Path, seed: int, fresh: bool = True) -> None:
    """Trains the adapter on the bundle of stage `base` and exports it.

    `fresh`: from random weights; otherwise the package's adapter is trained further, on the base that was.
    """
    root, config = folder.parent, ADAPTER
    bundle = root / "base" / "bundle"
    if not fresh:
        for_base(folder / "first", bundle)
        config = with_steps(dataclasses.replace(ADAPTER, init_adapter=str(folder / "first")), MORE)
    done = run(config, folder, seed, bundle, root / "world" / "pairs")
    export(done, folder / "adapter", None, dtype=SHIPPED, overwrite=True)


def for_base(folder: Path, bundle: Path) -> None:
    """The package's adapter, said to be made for another base of the same form."""
    source, base = default.paths()[1], open_bundle(bundle)
    manifest = read_adapter_manifest(source, base=base, any_base=True)
    with replacing(folder, overwrite=True, marks=MANIFESTS) as work:
        shutil.copytree(source, work, dirs_exist_ok=True)
        made_for = manifest["base"] | dict(fingerprint=base.fingerprint)
        write_manifest(work / ADAPTER_FILE, manifest["format"], manifest | dict(base=made_for))
