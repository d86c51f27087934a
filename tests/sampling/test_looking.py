"""Looking into a generation, of every family: the picture stays what it is, and maps are of the steps that drew it."""

import numpy as np
import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.sampling import looking
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.sampling.progress import Progress

ASKED = dict(steps=4, height=32, width=48, seed=2)


@pytest.fixture(scope="module", params=["tiny", "tiny2"])
def pipe(request):
    return DynaIPPipeline.load(*request.getfixturevalue(request.param))


def two(pipe, photograph, **changes):
    words = ["cup", "cat"]
    return pipe.request("a cup and a cat", [photograph, photograph], words=words, **ASKED | changes)


def test_maps_of_two_subjects_and_a_picture_that_is_as_without(pipe, photograph):
    request = two(pipe, photograph, image_end=0.7)
    look = looking.look(pipe, request, [0, 3])
    (alone,) = pipe.draw(request)
    np.testing.assert_array_equal(np.asarray(look.made.images[0]), np.asarray(alone.images[0]))
    first, last = look.glances
    times = pipe.family.times(4, pipe.family.tokens(request.latent))
    assert [g.step for g in look.glances] == [0, 3] and np.allclose([g.time for g in look.glances], times[[0, 3]])
    blocks, rows = len(look.names), look.text_rows + look.grid[0] * look.grid[1]
    assert first.maps.weights.shape[:3] == (blocks, rows, 2) and look.grid == (
        32 // pipe.family.multiple,
        48 // pipe.family.multiple,
    )
    np.testing.assert_allclose(first.maps.weights.sum(axis=-1), 1, atol=1e-5)
    assert not first.maps.gain[:, : look.text_rows].any(), "DDS is on"
    np.testing.assert_allclose(first.maps.gain[:, look.text_rows :].sum(axis=-1), 1, atol=1e-5)
    assert not last.maps.gain.any(), "the references act no more"
    np.testing.assert_allclose(look.regions().sum(axis=1), 1, atol=1e-5)
    places = first.maps.strength * first.maps.gain
    np.testing.assert_allclose(look.over_picture()[1, 0].ravel(), places[1, look.text_rows :, 0] / 2, rtol=1e-5)
    mean = (first.maps.weights + last.maps.weights) / 2
    image, text = mean[:, look.text_rows :].mean(axis=1), mean[:, : look.text_rows].mean(axis=1)
    np.testing.assert_allclose(look.over_references(), [image, text], rtol=1e-5)
    np.testing.assert_array_equal(last.expected, np.asarray(alone.images[0]))
    off = looking.look(pipe, two(pipe, photograph, text_gain=1.0), [0]).glances[0].maps
    assert (off.gain[:, : look.text_rows] == 1).all()
    np.testing.assert_allclose(off.weights[0], first.maps.weights[0], atol=1e-5)
    joined = looking.look(pipe, two(pipe, photograph, merge="concat"), [0]).glances[0].maps
    np.testing.assert_allclose(joined.weights.sum(axis=(-2, -1)), 1, atol=1e-5)


def test_what_is_no_one_picture_of_a_reference_is_refused(pipe, photograph):
    with pytest.raises(UserError, match="`num_images`: 2 pictures; expected one"):
        looking.look(pipe, two(pipe, photograph, num_images=2), [0])
    plain = pipe.without_adapter()
    with pytest.raises(UserError, match="`references`: none given; expected at least one, whose maps"):
        looking.look(plain, plain.request("a cup", **ASKED), [0])


def test_steps_are_seen_and_end_where_the_viewer_raises(pipe, photograph, capfd):
    class Enough(Exception):
        pass

    seen = []

    def view(step, latents, expected):
        seen.append((step, latents, expected))
        if len(seen) == 6:
            raise Enough

    request = two(pipe, photograph)
    (usual,) = pipe.draw(request)
    (made,) = pipe.draw(request, Progress(view=view))
    np.testing.assert_array_equal(np.asarray(made.images[0]), np.asarray(usual.images[0]))
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    np.testing.assert_array_equal(seen[0][1], request.latents([0]))
    with pytest.raises(Enough):
        list(pipe.draw(request, Progress(view=view)))
    assert [step for step, *_ in seen[4:]] == [0, 1]
    assert "Traceback" not in capfd.readouterr().err
    (again,) = pipe.draw(request)
    np.testing.assert_array_equal(np.asarray(again.images[0]), np.asarray(usual.images[0]))


def test_a_pipeline_without_its_adapter_is_the_base(pipe, request, photograph):
    name = "tiny" if pipe.family.name == "flux" else "tiny2"
    base = DynaIPPipeline.load(request.getfixturevalue(name)[0])
    one, other = (p("a cup", **ASKED) for p in (pipe.without_adapter(), base))
    np.testing.assert_array_equal(np.asarray(one.images[0]), np.asarray(other.images[0]))
    assert one.settings == other.settings
    assert pipe("a cup", photograph, **ASKED).settings["adapter"] is not None


def test_evenly_spread_steps_end_with_the_last():
    assert [looking.evenly(n, 16) for n in (1, 2, 4)] == [[15], [7, 15], [3, 7, 11, 15]]
    assert looking.evenly(9, 3) == [0, 1, 2]
