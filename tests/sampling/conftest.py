"""Pipelines of the `files` (bundle folder, adapter folder) that a module of tests names."""

import pytest

from dynaip_jax.sampling.pipeline import DynaIPPipeline
from tests.sampling.drawing import draw


@pytest.fixture(scope="module")
def base(files):
    """Without an adapter."""
    return DynaIPPipeline.load(files[0])


@pytest.fixture(scope="module")
def pipe(files):
    return DynaIPPipeline.load(*files)


@pytest.fixture(scope="module")
def plain(base):
    """What the base draws."""
    return draw(base)
