"""`SampleOptions`: written down once, checked where they are made, filled from the model's defaults."""

import dataclasses
import json

import numpy as np
import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.sampling.options import SampleOptions, reference_options, texts

DEFAULTS = dict(steps=8, guidance=3.5, height=128, width=64)
GUIDED, PLAIN = dict(multiple=16, takes_guidance=True), dict(multiple=16, takes_guidance=False)


def test_every_option_says_what_it_is():
    for field in dataclasses.fields(SampleOptions):
        assert field.metadata["doc"] and field.metadata["unit"], field.name


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(steps=0), "`steps` 0: expected at least 1"),
        (dict(num_images=0), "`num_images` 0: expected at least 1"),
        (dict(cache_threshold=0.0), "`cache_threshold` 0.0: expected a positive number"),
        (dict(cache_threshold=float("nan")), "`cache_threshold` nan"),
        (dict(merge="mean"), "`merge` mean: expected sum or concat"),
        (dict(regions="all"), "`regions` all: expected auto or none"),
        (dict(fit="squeeze"), "`fit` squeeze: expected pad or crop or stretch"),
        (dict(block_scale=1.0), "`block_scale` 1.0: expected numbers, one for each block"),
        (dict(block_scale=[[1, 2]]), "`block_scale` .*: expected numbers, one for each block"),
        (dict(granularity=(0, 0, 0)), "`granularity` .*not all zero"),
        (dict(granularity=(1, -1, 0)), "non-negative"),
        (dict(granularity=(1, 1)), "three non-negative"),
        (dict(image_start=0.8, image_end=0.2), "`image_start` 0.8 `image_end` 0.2"),
        (dict(steps=4.0), "`steps` 4.0: expected a whole number"),
        (dict(steps=True), "`steps` True .bool.: expected a whole number"),
        (dict(height=64.0), "`height` 64.0: expected a whole number"),
        (dict(seed="3"), "`seed` 3: expected a whole number"),
        (dict(seed=[1, 2]), "`seed` .1, 2. .list.: expected a whole number"),
        (dict(num_images=10**9), "`num_images` 1000000000: expected at most 10000"),
        (dict(steps=10**5000), "`steps` .*: expected at most 10000"),
        (dict(width=10**6), "`width` 1000000: expected at most 16384"),
        (dict(at_once=0), "`at_once` 0: expected at least 1"),
        (dict(true_cfg=float("nan")), "`true_cfg` nan: expected a finite number"),
        (dict(true_cfg=float("inf")), "`true_cfg` inf: expected a finite number"),
        (dict(guidance=1e38), "`guidance` 1e[+]38: expected a finite number, at most 1e[+]06 in size"),
        (dict(guidance="3"), "`guidance` 3: expected a number"),
        (dict(guidance=np.ones(2)), "`guidance` .*ndarray.*: expected a number"),
        (dict(image_scale=float("nan")), "`image_scale` nan: expected a finite number"),
        (dict(image_scale=[]), "`image_scale`: 0 numbers; expected at least one"),
        (dict(image_scale=[[1, 2], [3, 4]]), "`image_scale` .*: expected one number, or one for each reference"),
        (dict(image_scale=None), "`image_scale` None: expected a value, such as 1.0"),
        (dict(image_scale=dict(a=1)), "`image_scale` .*dict.*: expected a number"),
        (dict(granularity=3.0), "`granularity` 3.0: expected three non-negative numbers"),
        (dict(granularity=[1e38, 2e38, 3e38]), "`granularity` 1e[+]38: expected a finite number"),
        (dict(granularity=[1, [0, 0], 0]), "`granularity` .*: expected three non-negative numbers"),
        (dict(granularity="abc"), "`granularity` abc: expected a number"),
        (dict(image_start="0"), "`image_start` 0: expected a number"),
        (dict(image_end=float("nan")), "`image_end` nan"),
        (dict(negative_prompt=["a", "b"]), "`negative_prompt` .*list.*: expected text"),
        (dict(merge=["sum"]), "`merge` .*list.*: expected text"),
        (dict(fit=None), "`fit` None: expected a value, such as pad"),
    ],
)
def test_a_value_out_of_range_is_named(change, message):
    with pytest.raises(UserError, match=message) as error:
        SampleOptions(**change)
    assert error.value.field == next(iter(change))


def test_numbers_of_numpy_become_plain_ones():
    """So that they can be written as JSON, and compare and hash as options do."""
    given = dict(seed=np.int64(5), steps=np.uint8(3), image_scale=np.float32(0.5), guidance=np.array(2.0))
    options = SampleOptions(**given, granularity=np.array([1.0, 0, 0], np.float32), text_gain=np.array(0.25))
    plain = SampleOptions(seed=5, steps=3, image_scale=0.5, guidance=2.0, granularity=(1.0, 0.0, 0.0), text_gain=0.25)
    assert options == plain and hash(options) == hash(plain)
    assert json.loads(json.dumps(dataclasses.asdict(options))) == json.loads(json.dumps(dataclasses.asdict(plain)))


def test_rows_of_granularity_are_one_or_one_a_reference():
    options = SampleOptions(granularity=[[1, 0, 0], [0, 1, 0]])
    options.check_gains(2)
    with pytest.raises(UserError, match="`granularity`: 2 rows; expected one, or one for each of 1 references"):
        options.check_gains(1)


def test_what_stays_none_takes_the_models_defaults():
    filled = SampleOptions(width=32).filled(DEFAULTS, **GUIDED)
    assert (filled.steps, filled.guidance, filled.height, filled.width) == (8, 3.5, 128, 32)
    assert filled.true_cfg is None and filled.negative_prompt is None
    assert SampleOptions().filled(DEFAULTS, **PLAIN).guidance is None
    for options, message in (
        (SampleOptions(height=100), "`height` 100: expected a positive multiple of 16; try 96"),
        (SampleOptions(true_cfg=3.0), "`true_cfg` 3.0: needs something to steer away from; pass `negative_prompt`"),
    ):
        with pytest.raises(UserError, match=message):
            options.filled(DEFAULTS, **GUIDED)
    with pytest.raises(UserError, match="`guidance` 2.0: this model has no guidance embedding"):
        SampleOptions(guidance=2.0).filled(DEFAULTS, **PLAIN)


@pytest.mark.parametrize(
    "given, usual, expected",
    [
        (dict(), None, (None, None)),
        (dict(), 2.5, ("", 2.5)),
        (dict(negative_prompt="dull"), None, ("dull", 4.0)),
        (dict(negative_prompt="dull", true_cfg=3.0), 2.5, ("dull", 3.0)),
        (dict(true_cfg=1.0), 2.5, (None, None)),
    ],
)
def test_true_cfg_is_the_models_own_or_with_a_negative_prompt(given, usual, expected):
    filled = SampleOptions(**given).filled(DEFAULTS | dict(true_cfg=usual), **GUIDED)
    assert (filled.negative_prompt, filled.true_cfg) == expected


def test_arrays_are_tuples_so_that_options_are_values():
    one = SampleOptions(image_scale=np.array([0.5, 1.0]), granularity=[1, 0, 2])
    assert one == SampleOptions(image_scale=(0.5, 1.0), granularity=(1, 0, 2)) and hash(one)
    one.check_gains(2)
    with pytest.raises(UserError, match="`image_scale` .*one for each of 3 references"):
        one.check_gains(3)


def test_seeds_follow_each_other():
    assert SampleOptions(seed=5, num_images=3).seeds() == [5, 6, 7]
    with pytest.raises(UserError, match="`seed` 4294967295: expected a number from 0 to 4294967294"):
        SampleOptions(seed=2**32 - 1, num_images=2).seeds()


def test_options_of_references_are_known():
    assert {"image_scale", "text_gain", "granularity", "merge", "regions", "fit"} < set(reference_options())
    assert "steps" not in reference_options()


@pytest.mark.parametrize(
    ("given", "message"),
    (
        ("caf\udce9", "`prompt`: not UTF-8 from character 4 on"),
        (["a cat", "\ud83c"], "`prompt` 2: not UTF-8 from character 1 on"),
        (b"a cat", "`prompt` .*bytes.*: expected text, or a list of texts"),
        ([b"a cat"], "`prompt` 1 .*bytes.*: expected text"),
        (None, "`prompt` None .*: expected text, or a list of texts"),
    ),
)
def test_what_is_no_text_is_named(given, message):
    with pytest.raises(UserError, match=message):
        texts("prompt", given)
    assert texts("prompt", "a cat") == ["a cat"] and texts("prompt", ("a", "b")) == ["a", "b"]
    with pytest.raises(UserError, match="`negative_prompt`: not UTF-8"):
        SampleOptions(negative_prompt="\udce9")
