"""What an adapter does in the pipeline, and what it must not do, with every family."""

import json
import shutil

import jax
import numpy as np
import pytest

from dynaip_jax.adapters.dynaip import DynaIPConfig, init_adapter_params
from dynaip_jax.errors import UserError
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.storage.adapter import write_adapter
from dynaip_jax.storage.codec import to_dict
from tests.sampling.drawing import SIZE, draw, photographs


@pytest.fixture(scope="module", params=["tiny", "tiny2"])
def files(request):
    """(bundle folder, adapter folder) of a family."""
    return request.getfixturevalue(request.param)


def test_scale_zero_is_the_base_bit_for_bit(pipe, plain):
    np.testing.assert_array_equal(draw(pipe, photographs()[0], image_scale=0.0), plain)
    assert (draw(pipe, photographs()[0]) != plain).any()


def test_a_fresh_adapter_is_the_base_bit_for_bit(files, base, plain, tmp_path):
    config = DynaIPConfig.for_base(base.family.sites, 32, hmoe=dict(levels=(2, 3, 4)), blocks="all")
    params = jax.tree.map(np.asarray, init_adapter_params(config, jax.random.key(0)))
    identity = dict(family=base.bundle.manifest["family"], fingerprint=base.bundle.fingerprint)
    write_adapter(tmp_path / "fresh", to_dict(config), params, base=identity, step=0, conventions={})
    fresh = DynaIPPipeline.load(files[0], tmp_path / "fresh")
    np.testing.assert_array_equal(draw(fresh, photographs()[0], text_gain=1.0), plain)


@pytest.fixture
def changed(files, tmp_path):
    """Loads the adapter with other fields in its config; None: without that field, as older versions wrote it."""

    def load(**fields):
        folder = shutil.copytree(files[1], tmp_path / "changed", dirs_exist_ok=True)
        manifest = json.loads((folder / "adapter.json").read_text())
        manifest["config"] = {k: v for k, v in (manifest["config"] | fields).items() if v is not None}
        (folder / "adapter.json").write_text(json.dumps(manifest))
        return DynaIPPipeline.load(files[0], folder)

    return load


def test_the_adapter_says_how_its_term_is_computed(pipe, changed):
    photos = photographs()
    old = changed(query=None, merge=None)
    np.testing.assert_array_equal(draw(old, *photos), draw(pipe, *photos))
    assert (draw(changed(query="after_rope"), photos[0]) != draw(pipe, photos[0])).any()
    concat = changed(merge="concat")
    np.testing.assert_array_equal(draw(concat, *photos), draw(pipe, *photos, merge="concat"))
    np.testing.assert_array_equal(draw(concat, *photos, merge="sum"), draw(pipe, *photos))
    assert concat("a cat", photos, **SIZE).settings["merge"] == "concat"
    with pytest.raises(UserError, match="query 'some'.*export the adapter again"):
        changed(query="some")


def test_every_reference_option_acts(pipe):
    a, b = photographs()
    mask = np.zeros((32, 48), np.float32)
    mask[:, :24] = 1
    variants = [
        draw(pipe, a),
        draw(pipe, b),
        draw(pipe, b, fit="crop"),
        draw(pipe, a, b),
        draw(pipe, a, b, merge="concat"),
        draw(pipe, a, b, masks=[mask, 1 - mask]),
        draw(pipe, a, b, masks=[1 - mask, mask]),
        draw(pipe, a, image_scale=0.5),
        draw(pipe, a, text_gain=1.0),
        draw(pipe, a, granularity=(1, 0, 0)),
        draw(pipe, a, granularity=(0, 0, 1)),
        draw(pipe, a, image_start=0.4),
        draw(pipe, a, image_end=0.4),
    ]
    for i, x in enumerate(variants):
        for y in variants[:i]:
            assert (x != y).any()


def test_words_decide_where_subjects_go(pipe):
    """Auto regions are neither none nor those of other words, in a plain pass and in one with a negative prompt."""
    photos, names = photographs(), ["cat", "a dog"]

    def drawn(*references, **options):
        result = pipe("A cat and a dog", references, **(SIZE | options))
        return np.asarray(result.images[0]), result.settings

    auto, settings = drawn(*photos, words=names)
    assert settings["regions"] == "auto" and settings["words"] == names
    none, settings = drawn(*photos, words=names, regions="none")
    assert settings["regions"] == "none"
    np.testing.assert_array_equal(none, drawn(*photos)[0])
    np.testing.assert_array_equal(drawn(*photos, words=names, regions="auto")[0], auto)
    others = [none, drawn(*photos, words=names[::-1])[0], drawn(*photos, words=names, negative_prompt="a bird")[0]]
    others.append(drawn(*photos, negative_prompt="a bird")[0])
    for i, x in enumerate([auto, *others]):
        assert all((x != y).any() for y in others[i:])
    np.testing.assert_array_equal(drawn(photos[0], words=["cat"])[0], drawn(photos[0])[0])
    mask = np.ones((32, 48), np.float32)
    masked, settings = drawn(*photos, masks=[mask, mask], words=["cat", ""], regions="auto")
    assert settings["regions"] == "masks"
    np.testing.assert_array_equal(masked, drawn(*photos, masks=[mask, mask])[0])


def test_words_and_regions_that_do_not_fit(pipe):
    photos = photographs()
    for options, message in (
        (dict(words=["cat"]), "`words`: words for 1 subjects and 2 references"),
        (dict(words=["cat", ""]), "`regions` auto: 1 of 2 references have words.*with `words`"),
        (dict(regions="auto"), "`regions` auto: 0 of 2 references"),
        (dict(regions="all"), "`regions` all: expected auto or none"),
        (dict(words=["cat", "cat"]), "'cat' stand in the prompt 1 time"),
    ):
        with pytest.raises(UserError, match=message):
            draw(pipe, *photos, **options)


def test_start_and_end_count_steps(pipe, plain):
    """Of 3 steps, [0.34, 0.6) holds none but [0.3, 0.4) holds the second."""
    a = photographs()[0]
    np.testing.assert_array_equal(draw(pipe, a, image_start=0.34, image_end=0.6), plain)
    assert (draw(pipe, a, image_start=0.3, image_end=0.4) != plain).any()


def test_granularity_is_reported_as_used_and_scale_free(pipe):
    a = photographs()[0]
    result = pipe("a cat", [a], granularity=(0, 2, 6), **SIZE)
    np.testing.assert_allclose(result.routing, [[0, 0.25, 0.75]])
    np.testing.assert_array_equal(np.asarray(result.images[0]), draw(pipe, a, granularity=(0, 1, 3)))
    routed = pipe("a cat", photographs(), **SIZE).routing
    assert routed.shape == (2, 3) and np.allclose(routed.sum(axis=1), 1, atol=1e-5) and routed.std() > 0


def test_prompts_of_a_batch_are_drawn_as_each_alone(pipe):
    options = SIZE | dict(num_images=2, seed=5, negative_prompt="dull", words=["cat", "cup"])
    prompts = ["a cat and a cup", "the red cup, next to it a cat"]
    batch = pipe(prompts, photographs(), **options)
    assert batch.seeds == [5, 6, 5, 6] and batch.settings["prompt"] == prompts
    alone = [image for p in prompts for image in pipe(p, photographs(), **options).images]
    for found, expected in zip(batch.images, alone, strict=True):
        np.testing.assert_allclose(np.asarray(found, int), np.asarray(expected, int), atol=1)
    assert np.abs(np.asarray(alone[0], int) - np.asarray(alone[2], int)).max() > 4
    with pytest.raises(UserError, match="`prompt`: none given"):
        pipe([], photographs(), **SIZE)
