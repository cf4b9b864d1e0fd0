"""Intervals (P16)."""

import numpy as np
import pytest

from undertow.stats import mean_interval, rate_interval, wilson


def test_wilson_against_published_figures():
    """23 of 24 is [79.8, 99.3] % in the paper."""
    assert wilson(23, 24) == pytest.approx((0.798, 0.993), abs=5e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_independent_samples_give_plain_wilson():
    hits = [True] * 23 + [False]
    assert rate_interval(hits, [str(i) for i in range(24)]) == pytest.approx(wilson(23, 24))


def test_samples_of_one_source_are_not_independent():
    """P16: 91 flips from 6 questions that agree within each question carry the weight of 6."""
    hits = [question % 2 == 0 for question in range(6) for _ in range(15)]
    clusters = [f"q{question}" for question in range(6) for _ in range(15)]
    low, high = rate_interval(hits, clusters)
    plain_low, plain_high = rate_interval(hits, [str(i) for i in range(90)])
    assert high - low > 3 * (plain_high - plain_low)
    assert (low, high) == pytest.approx(wilson(3, 6), abs=0.02)


def test_unanimous_samples_count_as_clusters():
    assert rate_interval([True] * 90, [f"q{i % 6}" for i in range(90)]) == pytest.approx(wilson(6, 6))
    assert rate_interval([False] * 90, [f"q{i % 6}" for i in range(90)]) == pytest.approx(wilson(0, 6))


def test_unanimous_samples_are_judged_by_their_scores():
    """All 90 recovered; whether the six questions differ is still visible in the scores, and 89 of 90 is no surer than 90."""
    rng = np.random.default_rng(0)
    clusters = [f"q{i % 6}" for i in range(90)]
    question, noise = rng.normal(0, 1, 6), rng.normal(0, 1, 90)
    together = [5 + question[i % 6] + 0.05 * noise[i] for i in range(90)]
    apart = [5 + float(noise[i]) for i in range(90)]
    assert rate_interval([True] * 90, clusters, scores=together) == pytest.approx(wilson(6, 6), abs=0.02)
    assert rate_interval([True] * 90, clusters, scores=apart)[0] > 0.9
    almost = rate_interval([True] * 89 + [False], clusters, scores=[*together[:89], -0.1])
    assert almost[0] < rate_interval([True] * 90, clusters, scores=apart)[0]


def test_clusters_that_do_not_matter_cost_nothing():
    rng = np.random.default_rng(0)
    hits = (rng.random(600) < 0.4).tolist()
    low, high = rate_interval(hits, [f"c{i % 60}" for i in range(600)])
    plain = rate_interval(hits, [str(i) for i in range(600)])
    assert high - low <= 1.4 * (plain[1] - plain[0])


def test_coverage_of_the_clustered_interval():
    """Beta-binomial clusters: near-nominal coverage where the plain interval fails."""
    rng, covered, plain_covered, runs = np.random.default_rng(1), 0, 0, 300
    for _ in range(runs):
        rates = rng.beta(2, 2, size=20)
        hits = [bool(rng.random() < rate) for rate in rates for _ in range(10)]
        low, high = rate_interval(hits, [f"c{c}" for c in range(20) for _ in range(10)])
        covered += low <= 0.5 <= high
        low, high = rate_interval(hits, [str(i) for i in range(200)])
        plain_covered += low <= 0.5 <= high
    assert covered / runs >= 0.90
    assert plain_covered / runs < 0.85


def test_coverage_with_scores_far_from_normal():
    """Outcomes fixed by the cluster, magnitudes heavy-tailed: the scores alone would hide the clustering."""
    rng, covered, runs = np.random.default_rng(2), 0, 200
    for _ in range(runs):
        signs = rng.random(12) < 0.5
        clusters = [f"c{c}" for c in range(12) for _ in range(4)]
        scores = [float((1 if signs[c] else -1) * rng.lognormal(0, 2)) for c in range(12) for _ in range(4)]
        low, high = rate_interval([score > 0 for score in scores], clusters, scores=scores)
        covered += low <= 0.5 <= high
    assert covered / runs >= 0.92


def test_a_score_that_is_not_a_number_does_not_switch_clustering_off():
    hits, clusters = [i < 20 for i in range(40)], [f"c{i // 4}" for i in range(40)]
    scores = [float(hit) for hit in hits]
    scores[7] = float("nan")
    assert rate_interval(hits, clusters, scores=scores) == rate_interval(hits, clusters)


def test_bootstrap_of_a_mean():
    values, clusters = [1.0, 1.0, 5.0, 5.0], ["a", "a", "b", "b"]
    assert mean_interval(values, clusters, resamples=500) == pytest.approx((1.0, 5.0))
    assert mean_interval([2.0, 2.0], ["a", "b"]) == (2.0, 2.0)
    assert mean_interval(values, clusters, seed=3) == mean_interval(values, clusters, seed=3)
