"""The pipeline on the embedded tiny model: what each option does, and what it must not do."""

import re
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from dynaip_jax.errors import OutOfMemory, UserError
from dynaip_jax.families.quantize import quantized
from dynaip_jax.runtime import layouts, memory
from dynaip_jax.sampling import denoise, opening, pipeline
from dynaip_jax.sampling.options import SampleOptions
from dynaip_jax.sampling.pipeline import DynaIPPipeline
from dynaip_jax.storage.bundle import Bundle
from tests.sampling.drawing import SIZE, draw, photographs


@pytest.fixture(scope="module")
def files(tiny):
    return tiny


def test_each_seed_can_be_drawn_alone(base):
    three = base("a cat", seed=5, num_images=3, **SIZE)
    assert three.seeds == [5, 6, 7]
    alone = base("a cat", seed=7, **SIZE).images[0]
    difference = np.abs(np.asarray(three.images[2], int) - np.asarray(alone, int))
    assert difference.max() <= 1  # batched products may round differently
    assert (np.asarray(three.images[0]) != np.asarray(three.images[1])).any()


def test_true_cfg_steers_and_scale_one_is_plain(base, plain):
    assert (draw(base, negative_prompt="a dog", true_cfg=3.0) != plain).any()
    one = np.asarray(draw(base, negative_prompt="a dog", true_cfg=1.0), int)
    assert np.abs(one - np.asarray(plain, int)).max() <= 1


def test_references_as_path_picture_or_array_are_one(pipe, photograph):
    picture = Image.open(photograph)
    drawn = [draw(pipe, r) for r in (photograph, picture, np.asarray(picture))]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


def test_a_bare_picture_mask_or_word_is_one(pipe, photograph, tmp_path):
    Image.fromarray(np.where(np.arange(48) < 24, 255, 0).astype(np.uint8) * np.ones((32, 1), np.uint8)).save(
        tmp_path / "m.png"
    )
    for bare in (str(photograph), Image.open(photograph), photographs()[1], photograph.read_bytes()):
        result = pipe("a cat", bare, masks=str(tmp_path / "m.png"), words="cat", **SIZE)
        assert result.settings["words"] == ["cat"] and result.settings["regions"] == "masks"


def test_what_changes_nothing_is_in_the_result_and_a_warning(pipe, base):
    with pytest.warns(UserWarning, match="`image_start` 0.8 `image_end` 1.0: none of 3 steps"):
        result = pipe("a cat", photographs()[:1], image_start=0.8, **SIZE)
    assert len(result.warnings) == 1
    with pytest.warns(UserWarning, match="`image_scale`: without a reference"):
        draw(base, image_scale=0.5)
    with pytest.raises(UserError, match="`any_base`: no adapter to accept"):
        DynaIPPipeline.load(base.bundle.path, any_base=True)


def test_a_base_can_ask_for_true_cfg(base, plain, monkeypatch):
    """Its bundle's defaults say so: it then steers away from the empty prompt, unless told otherwise."""
    explicit = draw(base, negative_prompt="", true_cfg=3.0)
    other = draw(base, negative_prompt="a dog", true_cfg=3.0)
    monkeypatch.setitem(base.bundle.manifest["defaults"], "true_cfg", 3.0)
    np.testing.assert_array_equal(draw(base), explicit)
    np.testing.assert_array_equal(draw(base, negative_prompt="a dog"), other)
    np.testing.assert_array_equal(draw(base, true_cfg=1.0), plain)


def test_bfloat16_draws_about_the_same(tiny, plain):
    half = draw(DynaIPPipeline.load(tiny[0], dtype="bfloat16"))
    error = np.abs(half.astype(int) - plain.astype(int)).mean()
    assert 0 < error < 20


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_eight_bit_weights_draw_about_the_same(tiny, pipe, weights, monkeypatch):
    def from_the_host(family, params):
        assert {x.sharding.memory_kind for x in jax.tree.leaves(params)} == {"pinned_host"}
        return quantized(family, params)

    monkeypatch.setattr(opening, "quantized", from_the_host)
    small = DynaIPPipeline.load(*tiny, weights=weights, offload_text=True)
    size = {p: sum(x.nbytes for x in jax.tree.leaves(p.params["transformer"]["double_blocks"])) for p in (pipe, small)}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(small.params["transformer"])} == {"device"}
    assert size[small] < 0.35 * size[pipe]  # of float32; what is not a product's weight stays
    robot = photographs()[0]
    full, found = draw(pipe, robot).astype(float), draw(small, robot).astype(float)
    assert 0 < np.abs(found - full).mean() < 4


def test_eight_bit_weights_without_qwix_or_of_another_kind(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    monkeypatch.setattr(Bundle, "load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match="`weights`: 8-bit weights need qwix, which is not here; pip install qwix"):
        DynaIPPipeline.load(*tiny, weights="int8")
    with pytest.raises(UserError, match="`weights` int4: expected one of full, int8, fp8"):
        DynaIPPipeline.load(*tiny, weights="int4")


def test_weights_are_rounded_a_channel_and_a_block_at_a_time(pipe):
    family = pipe.family.with_compute("transformer", weights="int8")
    blocks = dict(pipe.params["transformer"])
    kernel = quantized(family, dict(blocks))["single_blocks"]["mlp_in"]["kernel"].array
    full = np.asarray(blocks["single_blocks"]["mlp_in"]["kernel"])
    scale = np.abs(full).max(axis=1, keepdims=True) / 127.5
    assert kernel.qvalue.dtype == np.int8
    np.testing.assert_allclose(kernel.scale, scale, rtol=0.01)
    np.testing.assert_allclose(np.asarray(kernel.qvalue) * np.asarray(kernel.scale), full, atol=scale.max() * 0.51)


def test_steps_from_the_cache(tiny, pipe):
    """No threshold that is ever met changes nothing; one that always is leaves the first step alone."""
    options = SIZE | dict(steps=6, negative_prompt="dull")
    drawn = {x: pipe("a cat", photographs()[:1], cache_threshold=x, **options) for x in (None, 1e-6, 9.0)}
    pictures = {x: np.asarray(result.images[0], int) for x, result in drawn.items()}
    assert "cached_steps" not in drawn[None].settings
    assert [drawn[x].settings["cached_steps"] for x in (1e-6, 9.0)] == [0, 5]
    assert np.abs(pictures[1e-6] - pictures[None]).max() <= 1
    assert 0 < np.abs(pictures[9.0] - pictures[None]).mean() < 40
    small = DynaIPPipeline.load(*tiny, weights="int8")
    assert small("a cat", photographs()[:1], cache_threshold=9.0, **options).settings["cached_steps"] == 5
    with pytest.raises(UserError, match="`cache_threshold` 0: expected a positive number, such as 0.1"):
        draw(pipe, photographs()[0], cache_threshold=0)


def test_what_would_be_cut_from_a_prompt_is_said(base):
    with pytest.warns(UserWarning, match="CLIP encoder takes no more; it does not see: 'z'"):
        result = base("x" * 75 + "z", **SIZE)
    assert len(result.warnings) == 1
    assert base("x" * 75, **SIZE).warnings == []


def test_an_adapter_without_references_and_the_reverse(pipe, base):
    with pytest.raises(UserError, match="`adapter`: no reference"):
        draw(pipe)
    with pytest.raises(UserError, match="`references`: no adapter"):
        draw(base, photographs()[0])
    with pytest.raises(UserError, match="`merge` mean: expected sum or concat"):
        draw(pipe, photographs()[0], merge="mean")


def test_weights_that_are_not_finite_are_named(base):
    params = dict(base.params) | dict(vae=jax.tree.map(lambda x: x * np.nan, base.params["vae"]))
    broken = DynaIPPipeline(base.bundle, base.family, params, base.tokenizers, None)
    with pytest.raises(UserError, match="weights of vae hold NaN"):
        draw(broken)


def test_threads_share_a_pipeline_and_each_sees_its_own_steps(pipe):
    from concurrent.futures import ThreadPoolExecutor

    jobs = [dict(seed=3, steps=3), dict(seed=4, steps=5)]
    alone = [pipe("a cat", photographs()[:1], **SIZE | job).images[0] for job in jobs]

    def run(job):
        steps = []
        result = pipe("a cat", photographs()[:1], progress=lambda: steps.append(1), **SIZE | job)
        return result.images[0], len(steps)

    with ThreadPoolExecutor(2) as pool:
        for (image, steps), expected, job in zip(pool.map(run, jobs), alone, jobs, strict=True):
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
            assert steps == job["steps"]


def test_a_call_leaves_the_pipeline_and_its_arrays_as_they_were(pipe):
    before = dict(vars(pipe)), {name: jax.tree.leaves(tree) for name, tree in pipe.params.items()}
    pipe("a cat", photographs()[:1], merge="concat", **SIZE)
    assert dict(vars(pipe)) == before[0]
    for name, leaves in before[1].items():
        assert not any(x.is_deleted() for x in leaves)
        assert all(x is y for x, y in zip(leaves, jax.tree.leaves(pipe.params[name]), strict=True))
    with pytest.raises(TypeError):
        pipe.defaults["steps"] = 1


def test_options_are_given_together_or_by_name(pipe):
    together = SampleOptions(seed=2, image_scale=0.5, **SIZE)
    result = pipe("a cat", photographs()[:1], options=together)
    np.testing.assert_array_equal(np.asarray(result.images[0]), draw(pipe, photographs()[0], seed=2, image_scale=0.5))
    assert result.options.image_scale == 0.5 and result.options.merge == "sum" and result.prompts == ["a cat"]
    with pytest.raises(
        UserError, match="`stpes`: no such option; expected some of at_once, block_scale, cache_threshold"
    ):
        pipe("a cat", photographs()[:1], stpes=3)


def arrays(result):
    return [np.asarray(image, int) for image in result.images]


@pytest.mark.parametrize("prompts", ["a cat and a cup", ["a cat and a cup", "a cup, then a cat"]])
def test_pictures_of_a_call_in_parts_are_those_of_the_whole(pipe, prompts):
    options = SIZE | dict(
        num_images=5 if isinstance(prompts, str) else 3, seed=2, negative_prompt="dull", words=["cat", "cup"]
    )
    whole = pipe(prompts, photographs(), **options)
    parts = list(pipe.draw(pipe.request(prompts, photographs(), at_once=2, **options)))
    assert [len(part.images) for part in parts] == ([2, 2, 1] if isinstance(prompts, str) else [2, 2, 2])
    assert [seed for part in parts for seed in part.seeds] == whole.seeds
    assert [text for part in parts for text in part.prompts] == whole.prompts
    for found, expected in zip((a for part in parts for a in arrays(part)), arrays(whole), strict=True):
        np.testing.assert_allclose(found, expected, atol=1)
    joined = pipe(prompts, photographs(), at_once=2, **options)
    assert joined.seeds == whole.seeds and joined.settings == whole.settings and len(joined.images) == len(whole.images)


def test_a_part_is_given_before_the_next_is_made(base):
    steps = []
    parts = base.draw(base.request("a cat", num_images=2, at_once=1, **SIZE), lambda: steps.append(1))
    assert next(parts).seeds == [0] and len(steps) == SIZE["steps"]
    assert next(parts).seeds == [1] and len(steps) == 2 * SIZE["steps"]


def test_pictures_are_as_many_at_once_as_the_memory_holds(base, monkeypatch):
    asked = []

    def check(program):
        asked.append(program)
        if len(asked) < 3:  # five at once, then three
            raise OutOfMemory("too much")

    monkeypatch.setattr(memory, "check_fits", check)
    options = SIZE | dict(num_images=5)
    parts = list(base.draw(base.request("a cat", **options)))
    assert [len(part.images) for part in parts] == [2, 2, 1]


def test_too_little_memory_says_what_was_asked_and_what_helps(base, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(UserError) as error:
        base("a cat", num_images=3, **SIZE)
    text = str(error.value)
    assert re.search(
        r"one picture of 48 x 32 pixels \(\d.* GiB are needed beside the weights, 0.0 GiB are free\)", text
    )
    assert "`height` and `width`" in text and "`weights` int8, `offload_text`" in text and "`mesh`" in text


def test_the_systems_own_error_of_memory_is_told_too(base, monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    monkeypatch.setattr(denoise, "decode", refuse)
    with pytest.raises(UserError, match="out of memory for one picture .*allocating 99 bytes"):
        base("a cat", num_images=2, **SIZE)
    monkeypatch.setattr(pipeline, "encode_text", refuse)
    with pytest.raises(UserError, match="out of memory"):
        base("a cat", **SIZE)


def test_pictures_are_decoded_in_halves_where_the_memory_needs_it(base, monkeypatch):
    whole, decode, sizes = arrays(base("a cat", num_images=3, **SIZE)), denoise.decode, []

    def small(family, params, latents):
        sizes.append(len(latents))
        if len(latents) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return decode(family, params, latents)

    monkeypatch.setattr(denoise, "decode", small)
    for found, expected in zip(arrays(base("a cat", num_images=3, **SIZE)), whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=1)
    assert sizes == [3, 1, 2, 1, 1]


def test_weights_that_the_memory_does_not_hold(tiny, monkeypatch):
    import orbax.checkpoint as ocp

    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", refuse)
    with pytest.raises(
        UserError, match="weights do not fit into memory .*99 bytes.*try `weights` int8, `offload_text`"
    ):
        DynaIPPipeline.load(tiny[0])


def test_phases_are_shown_and_what_made_it_compile_again(base, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    options = dict(steps=5, height=48, width=48)
    base("a cat", progress=True, **options)
    shown = capsys.readouterr().err
    for phase in ("compiling", "denoising", "5/5", "decoding"):
        assert phase in shown
    base("a cat", progress=True, **options)
    assert "compiling" not in capsys.readouterr().err
    base("a cat", progress=True, **options | dict(steps=6))
    assert "compiling again: steps 5 -> 6 [" in capsys.readouterr().err


def test_steps_are_not_counted_where_nobody_watches(base, monkeypatch):
    """JAX keeps no program on disk that calls back."""
    tickets = []
    run = layouts.Arranged.run

    def watched(self, function, config, args, options, program=None):
        tickets.append(options["ticket"])
        return run(self, function, config, args, options, program)

    monkeypatch.setattr(layouts.Arranged, "run", watched)
    base("a cat", progress=True, **SIZE)
    base("a cat", **SIZE)
    assert tickets == [None, None]
