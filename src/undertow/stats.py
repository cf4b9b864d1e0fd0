"""Intervals for rates and means, for samples that may come in clusters (P16).

Rates: the Wilson interval at an effective number of samples `n / deff`. The design effect is `deff = 1 + (m - 1) rho`,
with `m` the size-weighted mean cluster size and `rho` an intraclass correlation (one-way ANOVA estimator, at least 0). `rho`
is the larger of two: that of the outcomes, and that of the ranks of the scores whose sign makes the outcome. The second does
not break down where all outcomes agree, so that 0 of n is not judged otherwise than 1 of n. Where neither varies, `rho = 1`.

Means: the percentile bootstrap over clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata
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
    effective = len(outcomes) / design_effect(outcomes, clusters, scores)
    return wilson(float(outcomes.mean()) * effective, effective, confidence)


def design_effect(outcomes: np.ndarray, clusters: Sequence[str], scores: Sequence[float] | None = None) -> float:
    """`1 + (m - 1) rho`; 1 where every sample is its own cluster.

    Args:
        outcomes: `[sample]` 0 or 1.
        clusters: the cluster of each sample.
        scores: the numbers whose sign is the outcome; scores that are not finite rank lowest.
    """
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    sizes = np.bincount(member)
    if len(sizes) == len(outcomes):
        return 1.0
    weighted = float(np.square(sizes).sum() / len(outcomes))
    candidates = [outcomes]
    if scores is not None:
        candidates.append(rankdata(np.nan_to_num(np.asarray(scores, dtype=float), nan=-np.inf)))
    correlations = [_intraclass(numbers, member, sizes, weighted) for numbers in candidates if np.ptp(numbers) > 0]
    return 1 + (weighted - 1) * (max(correlations) if correlations else 1.0)


def _intraclass(numbers: np.ndarray, member: np.ndarray, sizes: np.ndarray, weighted: float) -> float:
    """ANOVA estimate of the intraclass correlation, within 0 and 1; 1 for a single cluster."""
    n, groups = len(numbers), len(sizes)
    if groups == 1:
        return 1.0
    means = np.bincount(member, weights=numbers) / sizes
    between = (sizes * np.square(means - numbers.mean())).sum() / (groups - 1)
    within = np.square(numbers - means[member]).sum() / (n - groups)
    typical = (n - weighted) / (groups - 1)
    return float(np.clip((between - within) / (between + (typical - 1) * within), 0.0, 1.0))


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
