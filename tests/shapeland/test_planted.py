"""A planted subject of Shapeland lights up its region."""

import numpy as np
import pytest

from dynaip_jax.eval.statistics import bootstrap_intervals
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland import default, planted


@pytest.fixture(scope="module")
def measured():
    return planted.measure(DynaIPPipeline.load(*default.paths()), 16)


def test_maps_cover_planted_subjects(measured):
    """256 cases: 0.7 (docs/looking.md); chance, the mask of another case, well below."""
    assert measured.overlaps.mean() >= 0.6
    assert measured.others.mean() < 0.35
    low, high = bootstrap_intervals(measured.overlaps[None])[0]
    assert low > 0.5 and f"{measured.overlaps.mean():.3f} [{low:.3f}, {high:.3f}], 16 cases" in measured.line()
    assert measured.blocks.shape == (6,) and np.argmax(measured.blocks) >= 2, "late blocks place subjects"
