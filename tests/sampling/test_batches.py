"""Pictures of several calls in one batch are those of each call alone."""

import numpy as np
import skimage.data

from dynaip_jax.sampling import batches
from dynaip_jax.sampling.batches import Asked, draw_together
from dynaip_jax.sampling.pipeline import DynaIPPipeline

OPTIONS = dict(steps=2, height=32, width=32, negative_prompt="grey", true_cfg=2.0)


def test_pictures_that_a_model_reads_by_itself_stay_with_their_call(tiny2):
    pipe = DynaIPPipeline.load(tiny2[0])
    pictures = [skimage.data.astronaut()[:64, :64], skimage.data.astronaut()[200:264, 200:264]]
    requests = [
        pipe.request("a cup", native_references=picture, seed=n, **OPTIONS) for n, picture in enumerate(pictures)
    ]
    assert len({batches.shape(r) for r in requests}) == len({batches.alike(r) for r in requests}) == 1
    together = draw_together(pipe, [Asked(r, 0) for r in requests])
    for one, request in zip(together, requests, strict=True):
        (alone,) = pipe.draw(request)
        assert one is not None and one.settings_of(0) == alone.settings_of(0)
        assert np.abs(np.asarray(one.images[0], int) - np.asarray(alone.images[0], int)).max() <= 1
    other = pipe.request("a cup", native_references=skimage.data.astronaut()[:64, :96], **OPTIONS)
    assert batches.shape(other) != batches.shape(requests[0])


def test_a_program_is_shared_by_calls_that_differ_in_numbers_alone(tiny):
    pipe, cup = DynaIPPipeline.load(*tiny), skimage.data.coffee()[:64, :64]
    two, words = [cup, cup[::-1]], dict(words=["cup", "cat"])

    def shape(references=two, prompt="a cup and a cat", **options):
        return batches.shape(pipe.request(prompt, references, **OPTIONS | options))

    own = shape()
    others = [shape([cup]), shape([cup, cup, cup]), shape(**words), shape(masks=[np.ones((32, 32), np.float32)] * 2)]
    others += [shape(**change) for change in (dict(steps=3), dict(height=48), dict(width=48), dict(merge="concat"))]
    others += [shape(cache_threshold=0.1), shape(negative_prompt=None, true_cfg=None)]
    assert len({own, *others}) == 1 + len(others)
    assert own == shape(prompt="a cat", seed=3, image_scale=0.5, text_gain=1.0, granularity=(1, 0, 0), num_images=2)
