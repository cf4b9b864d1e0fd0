"""Intervals for rates and means, for samples that may come in clusters (P16).

Rates: the Wilson interval at an effective number of samples `n / deff`. The design effect is `deff = 1 + (m - 1) rho`,
with `m` the size-weighted mean cluster size and `rho` the intraclass correlation (one-way ANOVA estimator, at least 0) of
the *scores* whose sign makes the outcome. Signs of scores that are near normal correlate less than the scores do, so this
errs on the cautious side, and unlike an estimate from the outcomes it does not break down where all of them agree. Scores
that do not vary at all give `rho = 1`.

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


def rate_interval(
    hits: Sequence[bool], clusters: Sequence[str], confidence: float = 0.95, scores: Sequence[float] | None = None
) -> Interval:
    """Wilson interval of a rate with clustered samples.

    Args:
        hits: one outcome for each sample.
        clusters: the cluster of each sample.
        confidence: coverage.
        scores: the numbers whose sign is the outcome; default: the outcomes themselves.
    """
    outcomes = np.asarray(hits, dtype=float)
    if len(outcomes) == 0:
        return 0.0, 1.0
    numbers = outcomes if scores is None else np.asarray(scores, dtype=float)
    effective = len(outcomes) / design_effect(numbers, clusters)
    return wilson(float(outcomes.mean()) * effective, effective, confidence)


def design_effect(scores: np.ndarray, clusters: Sequence[str]) -> float:
    """`1 + (m - 1) rho`; 1 where every sample is its own cluster.

    Args:
        scores: `[sample]` numbers.
        clusters: the cluster of each sample.
    """
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    sizes = np.bincount(member)
    n, groups = len(scores), len(sizes)
    weighted = float(np.square(sizes).sum() / n)
    if groups == n:
        return 1.0
    if groups == 1 or np.ptp(scores) == 0:
        return weighted
    means = np.bincount(member, weights=scores) / sizes
    between = (sizes * np.square(means - scores.mean())).sum() / (groups - 1)
    within = np.square(scores - means[member]).sum() / (n - groups)
    typical = (n - weighted) / (groups - 1)
    rho = (between - within) / (between + (typical - 1) * within)
    return 1 + (weighted - 1) * min(1.0, max(0.0, float(rho)))


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
