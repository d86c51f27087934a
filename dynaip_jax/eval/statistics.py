"""How sure a mean over cases is."""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95


def bootstrap_intervals(values: np.ndarray) -> np.ndarray:
    """Percentile bootstrap intervals `[m, 2]` of the means of m measures `[m, n]` on the same n cases.

    All measures are resampled alike, and every call draws the same resamples of n cases. One case gives intervals of no width.
    """
    if values.shape[-1] == 1:  # SciPy refuses it
        return np.repeat(values, 2, axis=-1)
    from scipy.stats import bootstrap

    result = bootstrap(
        (values,),
        np.mean,
        axis=-1,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return np.stack(result.confidence_interval, axis=-1)


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of `[n]` and its interval, of those that are not NaN; three NaN if all are."""
    there = values[~np.isnan(values)]
    if not len(there):
        return (np.nan,) * 3
    low, high = bootstrap_intervals(there[None].astype(float))[0]
    return float(there.mean()), float(low), float(high)
