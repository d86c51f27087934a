"""Pictures of a row are those that the pipeline draws."""

import numpy as np
import pytest

from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.shapeland import cases as cases_module
from dynaip_jax.shapeland.cases import make_cases
from dynaip_jax.shapeland.draw import draw, noise, widened
from dynaip_jax.shapeland.settings import ROWS
from dynaip_jax.shapeland.world import SIZE, caption
from tests.shapeland.models import make_model


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return DynaIPPipeline.load(*make_model(tmp_path_factory.mktemp("shapeland")))


@pytest.mark.parametrize(("row", "batch"), (("default", 2), ("regions-given", 1)))
def test_pictures_are_the_pipelines(pipe, row, batch, monkeypatch):
    """Case by case what `DynaIPPipeline` draws, though sampled in batches, the last of them filled up."""
    monkeypatch.setattr(cases_module, "BATCH", batch)
    cases = make_cases(2, seed=3, num=3)
    batched = draw(pipe, cases, ROWS[row], seed=3)
    latents = noise(3, np.arange(3), pipe.family.latent(SIZE, SIZE))
    for n, scene in enumerate(cases.scenes):
        words, masks = [s.kind for s in scene.subjects], widened(cases.masks[n])
        options = dict(words=words) if row == "default" else dict(masks=masks)
        alone = pipe(caption(scene), list(cases.references[n]), noise=np.asarray(latents[n : n + 1]), **options)
        difference = np.abs(np.asarray(alone.images[0]).astype(int) - batched[n])
        assert difference.max() <= 2, f"case {n}: pixels differ by up to {difference.max()}"
