"""Initial latents from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dynaip_jax.errors import UserError, reason
from dynaip_jax.reading import read_bytes
from dynaip_jax.sampling.options import MOST
from dynaip_jax.storage.arrays import read_array

LARGEST = 1 << 30  # bytes of a file


def read_noise(path: Path, row: int | None = None) -> np.ndarray:
    """Initial latents `[b, c, h, w]` of any float type in a .npy file, or one `row` of them `[1, c, h, w]`, of which the pipeline
    checks the rest. Raises `UserError` for what is no such file and for a row that it lacks."""
    expected = "expected a .npy file of floats [b, c, h, w]"
    try:
        noise = read_array(read_bytes(path, LARGEST), "f")
    except (OSError, ValueError) as e:
        raise UserError(
            f"`noise` {path}: cannot be read as a NumPy array ({reason(e)}); {expected}; save it anew"
        ) from e
    if noise.ndim != 4 or not noise.size:
        raise UserError(f"`noise` {path}: found {noise.dtype} {list(noise.shape)}; {expected}; save another")
    if len(noise) > MOST:
        raise UserError(f"`noise` {path}: {len(noise)} noises, one a picture; expected at most {MOST}; split the file")
    if row is not None and not 0 <= row < len(noise):
        raise UserError(f"`noise_row` {row}: expected a number from 0 to {len(noise) - 1}, a row of {path}")
    return noise if row is None else noise[row : row + 1]
