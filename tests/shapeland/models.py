"""A quick model of Shapeland, and a judge that sees nothing."""

import json
import shutil

import jax
import numpy as np
from safetensors.numpy import save_file

from dynaip_jax.shapeland import default
from dynaip_jax.shapeland.judge import init_judge
from dynaip_jax.storage.manifest import flatten


def make_model(folder):
    """Writes the embedded model with 4 steps for its default -> folders of bundle and adapter."""
    bundle, adapter = (shutil.copytree(path, folder / path.name) for path in default.paths())
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["defaults"] |= dict(steps=4)
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    return bundle, adapter


def make_judge(path):
    """Writes random weights of the judge -> `path`."""
    save_file({k: np.asarray(v) for k, v in flatten(init_judge(jax.random.key(0))).items()}, path)
    return path
