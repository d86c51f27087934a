"""Grids of pictures."""

import numpy as np
import pytest
from PIL import Image

from dynaip_jax import images


def test_grid():
    cells = [np.full((4, 6, 3), 10 * n, np.uint8) for n in range(5)]
    whole = np.asarray(images.grid([Image.fromarray(c) for c in cells]))
    assert whole.shape == (8, 18, 3)
    assert [whole[r * 4, c * 6, 0] for r in range(2) for c in range(3)] == [0, 10, 20, 30, 40, 255]
    assert images.grid(cells, columns=1).size == (6, 20)
    assert images.grid(cells[:2], columns=9).size == (12, 4)
    with pytest.raises(ValueError, match="at least one picture"):
        images.grid([])
    with pytest.raises(ValueError, match="all of one size"):
        images.grid([cells[0], cells[0][:2]])
    with pytest.raises(ValueError, match="0 columns"):
        images.grid(cells, columns=0)
