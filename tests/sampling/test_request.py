"""Calls are checked against a model whose weights have not been read."""

import numpy as np
import pytest
import skimage.data

from dynaip_jax.errors import UserError
from dynaip_jax.sampling.opening import open_model
from dynaip_jax.sampling.request import make_request
from dynaip_jax.storage.bundle import Bundle

SIZE = dict(steps=3, height=32, width=48)


@pytest.fixture(scope="module")
def model(tiny):
    return open_model(*tiny).model


@pytest.fixture(scope="module")
def base(tiny):
    return open_model(tiny[0]).model


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    monkeypatch.setattr(Bundle, "load", lambda *_, **__: pytest.fail("weights were read"))


def references(count=1):
    return [skimage.data.astronaut(), skimage.data.coffee()][:count]


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(prompt=[]), "`prompt`: none given"),
        (dict(prompt=3), "`prompt` 3: expected text, or a list"),
        (dict(prompt=["a cat", None]), "`prompt` 2 None .*: expected text"),
        (dict(references=5), "`references`: found int; expected a path"),
        (dict(words="dog"), "`words`, subject 1: its words 'dog' are not in the prompt"),
        (dict(words=[3]), "`words` 1 3: expected text"),
        (dict(masks=7), "`masks`: found int; expected a path"),
        (dict(options=dict(steps=3)), "`options` .*dict.*: expected a SampleOptions"),
        (dict(height=40), "`height` 40: expected a positive multiple of 16"),
        (dict(seed=-1), "`seed` -1: expected a number from 0"),
        (
            dict(prompt=["a cat"] * 101, num_images=100),
            "`num_images`: 101 prompts of 100 pictures; expected at most 10000",
        ),
        (dict(noise="no"), "`noise`: found <U2"),
        (dict(noise=np.zeros((1, 8, 4, 5))), r"`noise`: found float64 \[1, 8, 4, 5\]; expected floats \[b, "),
        (dict(granularity=[[1, 0, 0]] * 2), "`granularity`: 2 rows"),
        (dict(image_scale=[1, 2, 3]), "`image_scale` .*one for each of 1 references"),
        (dict(words=["dog"]), "its words 'dog' are not in the prompt"),
        (dict(masks=["a.png", "b.png"]), "`masks`: 2 masks for 1 references"),
        (dict(masks=["/nowhere/a.png"]), "/nowhere/a.png: no such file"),
        (dict(references=[]), "`adapter`: no reference picture"),
    ],
)
def test_what_does_not_fit_is_known_without_weights(model, call, message):
    given = SIZE | call
    own = {name: given.pop(name) for name in ("masks", "words", "noise", "options") if name in given}
    with pytest.raises(UserError, match=message):
        make_request(model, given.pop("prompt", "a cat"), given.pop("references", references()), **own, changes=given)


@pytest.mark.parametrize(
    "change",
    [
        dict(dtype="float16"),
        dict(dtype=3),
        dict(attention=["xla"]),
        dict(weights=None),
        dict(any_base="yes"),
        dict(offload_text=3),
        dict(mesh="data=2"),
    ],
)
def test_options_of_loading_are_named(tiny, change):
    with pytest.raises(UserError, match=f"`{next(iter(change))}` .*expected"):
        open_model(*tiny, **change)


def test_pictures_are_counted_by_prompt_and_seed(base):
    request = make_request(base, ["a cat", "a cup"], changes=SIZE | dict(num_images=2, seed=5))
    assert len(request) == 4 and request.texts == ["a cat", "a cup"]
    whole = request.latents(range(4))
    assert whole.shape == (4, *request.latent)
    np.testing.assert_array_equal(whole[:2], whole[2:])
    np.testing.assert_array_equal(request.latents([3])[0], whole[1])
