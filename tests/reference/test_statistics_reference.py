"""Our intervals and tests against scipy and the definitions."""

from itertools import combinations

import numpy as np
import pytest
import scipy.stats

from pipeline.scoring import METRICS
from pipeline.statistics import NORMAL, ScoreTable, holm, mcnemar, paired_proportions, percentiles, wilson


@pytest.mark.parametrize(("hits", "num"), [(0, 49), (1, 1), (7, 10), (49, 49), (123, 2000)])
def test_wilson_is_scipys(hits, num):
    ours, test = wilson(hits, num), scipy.stats.binomtest(hits, num)
    assert (ours.low, ours.high) == pytest.approx(test.proportion_ci(method="wilson"), abs=1e-12)
    assert (ours.low, ours.high) != pytest.approx(test.proportion_ci(method="wilsoncc"), abs=1e-4)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (0, 5), (6, 0), (3, 9), (40, 40), (120, 310)])
def test_mcnemar_is_the_binomial_test(only_first, only_second):
    num = only_first + only_second
    expected = scipy.stats.binomtest(only_first, num).pvalue if num else 1.0
    assert mcnemar(only_first, only_second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(only_second, only_first) == mcnemar(only_first, only_second)
    assert mcnemar(only_first + 9, only_second) < expected or only_first < only_second  # negative control


def test_holm_is_the_closed_bonferroni_test():
    """Adjusted p of i: the largest Bonferroni p of all families that i is in (Holm 1979; Marcus et al. 1976)."""
    p_values = np.random.default_rng(0).uniform(0, 0.2, 7).tolist()
    families = [family for size in range(1, 8) for family in combinations(range(7), size)]
    expected = [
        min(1.0, max(len(family) * min(p_values[k] for k in family) for family in families if i in family))
        for i in range(7)
    ]
    assert holm(p_values) == pytest.approx(expected, rel=1e-12)
    assert holm(p_values) != pytest.approx([min(1.0, 7 * p) for p in p_values], rel=1e-3)
    assert holm([]) == []


def test_bonett_and_price_by_their_formula():
    """Bonett and Price 2012, adjusted Wald: both discordant shares with one item added, of n + 2 items."""
    f12, f21, n = 14, 3, 60
    p12, p21 = (f12 + 1) / (n + 2), (f21 + 1) / (n + 2)
    half = scipy.stats.norm.ppf(0.975) * np.sqrt((p12 + p21 - (p12 - p21) ** 2) / (n + 2))
    interval, error = paired_proportions(f12, f21, n)
    assert (interval.low, interval.high) == pytest.approx((p12 - p21 - half, p12 - p21 + half), abs=1e-12)
    assert error == pytest.approx(half / scipy.stats.norm.ppf(0.975))


def made_losses(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of two models, float64 [num, 2]: nats and tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 60, num)
    hard = rng.gamma(2.0, 0.5, num)
    first, second = (tokens * np.maximum(0.01, hard + rng.normal(0, 0.2, num)) for _ in range(2))
    return np.stack([first, tokens], axis=1), np.stack([second, tokens], axis=1)


def test_the_paired_bootstrap_is_scipys():
    first, second = made_losses(200, 0)
    table = ScoreTable({("a", "loss"): first, ("b", "loss"): second}, METRICS, range(200), num_resamples=20000)
    ours = table.compare("a", "b", "loss").interval

    def difference(a, b, tokens, axis):
        return (a.sum(axis) - b.sum(axis)) / tokens.sum(axis)

    # scipy's plain percentiles, at the confidence that the expansion for 200 rows stands for
    tail = NORMAL.cdf(np.sqrt(200 / 199) * scipy.stats.t.ppf(0.025, 199))
    options = {"n_resamples": 20000, "method": "percentile", "vectorized": True, "rng": 1}
    data = (first[:, 0], second[:, 0], first[:, 1])
    theirs, plain, unpaired = (
        scipy.stats.bootstrap(data, difference, paired=paired, confidence_level=level, **options).confidence_interval
        for paired, level in ((True, 1 - 2 * tail), (True, 0.95), (False, 0.95))
    )
    width = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03 * width)
    assert ours.high - ours.low == pytest.approx(plain.high - plain.low, rel=0.03)
    assert unpaired.high - unpaired.low > 2 * width


def test_few_clusters_widen_the_percentiles_to_students_t():
    """The expanded percentile interval of normal samples is the interval of Student's t (Hesterberg 2015)."""
    for num in (6, 20):
        samples = scipy.stats.norm.ppf((np.arange(100000) + 0.5) / 100000) * np.sqrt((num - 1) / num)
        assert percentiles(samples, num).high == pytest.approx(scipy.stats.t.ppf(0.975, num - 1), rel=1e-2)


def test_the_cluster_bootstrap_is_the_direct_loop():
    rng, clusters = np.random.default_rng(5), np.repeat(np.arange(12), [1, 2, 3, 4] * 3)
    items = np.stack([rng.normal(clusters, 0.1), np.ones(30)], axis=1)
    table = ScoreTable({("a", "loss"): items}, METRICS, clusters.tolist(), num_resamples=20000)
    groups = [np.flatnonzero(clusters == k) for k in range(12)]
    loop, loose = [], []
    for _ in range(4000):
        sums = items[np.concatenate([groups[k] for k in rng.integers(0, 12, 12)])].sum(axis=0)
        loop.append(sums[0] / sums[1])
        sums = items[rng.integers(0, 30, 30)].sum(axis=0)
        loose.append(sums[0] / sums[1])
    points = [0.025, 0.25, 0.5, 0.75, 0.975]
    ours, spread = np.quantile(table.samples("a", "loss"), points), np.std(loop)
    assert ours == pytest.approx(np.quantile(loop, points), abs=0.12 * spread)
    assert ours != pytest.approx(np.quantile(loose, points), abs=0.3 * spread)
