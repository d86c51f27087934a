"""Intervals come out as they were published."""

import numpy as np
import pytest

from dynaip_jax.eval.statistics import bootstrap_intervals


def values(n=40):
    rng = np.random.default_rng(42)
    cp, pf = rng.normal(0.6, 0.35, n), rng.integers(0, 5, n) / 4
    return np.stack([cp, pf, cp * pf])


def test_intervals_are_those_of_the_published_tables():
    """Computed by 2.5 and 97.5 % of `values[:, default_rng(0).integers(n, size=(1000, n))].mean(axis=-1)`."""
    expected = [
        [0.5256019109804724, 0.7021608757511173],
        [0.425, 0.64375],
        [0.24179277749592562, 0.42224126846530546],
    ]
    np.testing.assert_allclose(bootstrap_intervals(values()), expected, rtol=0, atol=1e-15)


def test_measures_are_resampled_alike():
    together = bootstrap_intervals(values())
    np.testing.assert_allclose(together[2:], bootstrap_intervals(values()[2:]), rtol=0, atol=1e-15)


def test_one_case_has_no_width():
    np.testing.assert_array_equal(bootstrap_intervals(np.array([[0.5], [1.0]])), [[0.5, 0.5], [1.0, 1.0]])


def test_more_cases_are_surer():
    few, many = (np.diff(bootstrap_intervals(values(n)))[0, 0] for n in (40, 640))
    assert many == pytest.approx(few / 4, rel=0.25)
