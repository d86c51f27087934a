"""Stage `encoders`: a bundle of what is trained before the base model."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from dynaip_jax.shapeland import default
from dynaip_jax.shapeland.world import SIZE
from dynaip_jax.storage.bundle import NewComponent, write_bundle
from dynaip_jax.storage.codec import to_dict
from dynaip_jax.storage.folders import replacing
from dynaip_jax.storage.manifest import MANIFESTS
from dynaip_jax.storage.tensors import read_tree
from train.shapeland.configs import CONFIGS, FAMILY, STEPS, TOKENS, TRUE_CFG
from train.shapeland.tokenizers import write_tokenizers
from train.shapeland.vae import SCALE
from train.shapeland.workdir import WEIGHTS, rounded


def write_encoders(folder: Path, seed: int) -> None:
    """A bundle of what is trained so far, with a transformer of random weights."""
    root = folder.parent
    scale = json.loads((root / "vae" / SCALE).read_text())
    trained = dict(
        vae=read_tree(root / "vae" / WEIGHTS),
        t5=read_tree(root / "text" / WEIGHTS),
        **read_tree(root / "clip" / WEIGHTS),
    )

    def components() -> Iterator[NewComponent]:
        for name, config in CONFIGS.items():
            config = dataclasses.replace(config, **scale) if name == "vae" else config
            params = trained.get(name) or FAMILY.init_params(name, jax.random.key(seed))
            origin = dict(made_by=f"train.shapeland, seed {seed}")
            yield NewComponent(name, to_dict(config), rounded(params), [origin])

    with tempfile.TemporaryDirectory() as work:
        write_bundle(
            folder / "bundle",
            components(),
            family=FAMILY.name,
            schedule=to_dict(FAMILY.schedule),
            text=TOKENS,
            defaults=dict(steps=STEPS, true_cfg=TRUE_CFG, height=SIZE, width=SIZE),
            tokenizers=write_tokenizers(Path(work)),
            overwrite=True,
        )


def keep_bundle(folder: Path, seed: int) -> None:
    """The package's bundle as it is."""
    with replacing(folder / "bundle", overwrite=True, marks=MANIFESTS) as work:
        shutil.copytree(default.paths()[0], work, dirs_exist_ok=True)
