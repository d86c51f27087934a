"""`SampleOptions`: written down once, checked where they are made, filled from the model's defaults."""

import dataclasses

import numpy as np
import pytest

from dynaip_jax.errors import UserError
from dynaip_jax.sampling.options import SampleOptions, reference_options

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
        (dict(fit="stretch"), "`fit` stretch: expected pad or crop"),
        (dict(granularity=(0, 0, 0)), "`granularity` .*not all zero"),
        (dict(granularity=(1, -1, 0)), "non-negative"),
        (dict(granularity=(1, 1)), "three non-negative"),
        (dict(image_start=0.8, image_end=0.2), "`image_start` 0.8 `image_end` 0.2"),
    ],
)
def test_a_value_out_of_range_is_named(change, message):
    with pytest.raises(UserError, match=message) as error:
        SampleOptions(**change)
    assert error.value.field == next(iter(change))


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
