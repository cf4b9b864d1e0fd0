"""Intervals for rates and means, for samples that may come in clusters (P16).

Rates: the Wilson interval, at an effective number of samples `n / deff`. The design effect `deff` is the ratio of the
cluster-robust variance of the mean to the binomial one, and at least 1. When all samples agree the data cannot tell how
far clusters agree, so the number of clusters is used as the number of samples: the cautious end.

Means: the percentile bootstrap over clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from statsmodels.stats.proportion import proportion_confint

Interval = tuple[float, float]


def wilson(successes: float, n: float, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a rate; `(0, 1)` when `n` is 0."""
    if n <= 0:
        return 0.0, 1.0
    low, high = np.asarray(proportion_confint(successes, n, alpha=1 - confidence, method="wilson"), dtype=float)
    return max(0.0, float(low)), min(1.0, float(high))


def rate_interval(hits: Sequence[bool], clusters: Sequence[str], confidence: float = 0.95) -> Interval:
    """Wilson interval of a rate with clustered samples.

    Args:
        hits: one outcome for each sample.
        clusters: the cluster of each sample.
        confidence: coverage.
    """
    outcomes = np.asarray(hits, dtype=float)
    n = len(outcomes)
    if n == 0:
        return 0.0, 1.0
    rate = outcomes.mean()
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    groups = member.max() + 1
    if groups == n:
        effective = float(n)
    elif rate in (0.0, 1.0):
        effective = float(groups)
    else:
        residuals = np.bincount(member, weights=outcomes - rate)
        correction = groups / (groups - 1) if groups > 1 else n
        robust = correction * np.square(residuals).sum() / n**2
        effective = n / max(1.0, robust / (rate * (1 - rate) / n))
    return wilson(rate * effective, effective, confidence)


def mean_interval(
    values: Sequence[float], clusters: Sequence[str], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of a mean, resampling clusters; the mean itself when there is one cluster.

    Args:
        values: one number for each sample.
        clusters: the cluster of each sample.
        confidence: coverage.
        resamples: number of bootstrap samples.
        seed: of the resampling.
    """
    numbers = np.asarray(values, dtype=float)
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    sums, sizes = np.bincount(member, weights=numbers), np.bincount(member)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
