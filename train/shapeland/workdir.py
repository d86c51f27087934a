"""What stages leave in the working directory: `workdir`/STAGE holds the files of a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynaip_jax.storage.tensors import write_tree

DONE = "done.json"  # written when a stage is finished
SPENT = "seconds.txt"  # what a stage has taken so far
WEIGHTS = "weights.safetensors"
SHIPPED = "bfloat16"  # dtype of weights in bundles and adapters


def save_weights(folder: Path, params: Any) -> None:
    """Writes parameters to `folder`/`WEIGHTS`."""
    write_tree(folder / WEIGHTS, params)


def rounded(params: Any) -> Any:
    """Parameters in the dtype that ships."""
    return jax.tree.map(lambda x: np.asarray(x, jnp.dtype(SHIPPED)), params)
