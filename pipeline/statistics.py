"""How sure a score is, and whether two models differ: intervals, tests, and what a test set could have shown.

Every score here is a function of sums over items (test rows), so that a resample of the items needs sums alone.
Items of one cluster (one prompt) are resampled together, all models on the same resamples: differences are paired.

    proportions        Wilson's interval; two models': McNemar's exact test, Bonett and Price's interval (2012);
                       in clusters, of counts divided by the design effect (Rao and Scott 1992)
    everything else    paired percentile bootstrap over clusters (Efron and Tibshirani 1993), its percentiles moved
                       outwards for few clusters (the expanded percentile interval, Hesterberg 2015)
    several at once    Holm's step-down procedure (1979)

Shape suffixes: N items, G clusters, K sums of a score, R resamples.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from statistics import NormalDist

import numpy as np
from scipy.special import betainc, stdtr, stdtrit

CONFIDENCE = 0.95
POWER = 0.8  # with which the smallest difference would have been shown
NUM_RESAMPLES = 5000
MIN_CLUSTERS = 5  # the differences of 4 have all one sign by chance once in 8 times
CHUNK = 2**22  # cluster counts held at once
NORMAL = NormalDist()
TAIL = (1 - CONFIDENCE) / 2
Z = NORMAL.inv_cdf(1 - TAIL)
# Changed items, all one way, that are expected when McNemar's test finds them with 80 % power: it needs 6 or more, and
# a Poisson variable of this mean is 6 or more in 80 % of cases.
MCNEMAR_FLOOR = 7.906


class Outcome(StrEnum):
    better = "better"
    worse = "worse"
    none = "no difference shown"


@dataclass(frozen=True)
class Metric:
    """A score as a function of sums over items.

    Attributes:
        of_sums: float64 [..., K] to [...]; NaN where there is no item.
        is_proportion: the sums are hits (0 or 1 an item) and items (0 or 1).
    """

    of_sums: Callable[[np.ndarray], np.ndarray]
    higher_is_better: bool
    is_proportion: bool = False


@dataclass(frozen=True)
class Interval:
    """Of 95 % confidence; both NaN where there is too little to say."""

    low: float
    high: float


UNKNOWN = Interval(math.nan, math.nan)


@dataclass(frozen=True)
class Estimate:
    value: float
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """Model `first` minus model `second` in one score.

    Attributes:
        p_value: two-sided; 1 where there is too little to say; adjusted by Holm where several comparisons were asked
            for at once.
        smallest_shown: the difference that this test set would have shown at 95 % with 80 % power, taken alone; NaN
            where there is too little to say.
    """

    first: str
    second: str
    metric: str
    difference: float
    interval: Interval
    p_value: float
    smallest_shown: float
    outcome: Outcome


def wilson(hits: float, num: float, z: float = Z) -> Interval:
    """Wilson's score interval of a proportion (1927); NaN for no items.

    Args:
        z: half-width in standard errors.
    """
    if num == 0:
        return UNKNOWN
    share, spread = hits / num, z**2 / num
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / num + spread / (4 * num))
    return Interval(max(0.0, middle - half) if hits else 0.0, min(1.0, middle + half) if hits < num else 1.0)


def mcnemar(only_first: float, only_second: float) -> float:
    """Exact two-sided p of McNemar's test (1947): items that only the first, and only the second, gets right.

    The binomial tail is an incomplete beta function, so that counts divided by a design effect need no rounding.
    """
    few, many = sorted((only_first, only_second))
    return float(min(1.0, 2 * betainc(many, few + 1, 0.5))) if many else 1.0


def paired_proportions(only_first: float, only_second: float, num: float) -> tuple[Interval, float]:
    """Bonett and Price's interval (2012, "adjusted Wald") of the difference of two proportions on the same items.

    Returns:
        The interval, and the standard error that it is made of. NaN for no items.
    """
    if num == 0:
        return UNKNOWN, math.nan
    first, second = (only_first + 1) / (num + 2), (only_second + 1) / (num + 2)
    error = math.sqrt((first + second - (first - second) ** 2) / (num + 2))
    return Interval(max(-1.0, first - second - Z * error), min(1.0, first - second + Z * error)), error


def design_effect(residuals_N: np.ndarray, clusters_N: np.ndarray) -> float:
    """How many times larger the variance of a mean is than it would be were the items independent; 1 or more.

    The mean number of items a cluster (items of a cluster all alike) where the residuals cannot tell: all 0, or fewer
    than `MIN_CLUSTERS` clusters.

    Args:
        residuals_N: items minus their mean.
        clusters_N: int64, what cluster each is in.
    """
    num, (_, index_N) = len(residuals_N), np.unique(clusters_N, return_inverse=True)
    num_clusters = int(index_N.max()) + 1
    independent = float((residuals_N**2).sum()) * num / max(num - 1, 1)
    if num_clusters < MIN_CLUSTERS or independent == 0:
        return num / num_clusters
    sums_G = np.bincount(index_N, weights=residuals_N)
    return max(1.0, float((sums_G**2).sum()) * num_clusters / (num_clusters - 1) / independent)


def percentiles(samples_R: np.ndarray, num_clusters: int) -> Interval:
    """The expanded percentile interval (Hesterberg 2015); resamples without an item of the score (NaN) are left out."""
    known_R = samples_R[np.isfinite(samples_R)]
    if num_clusters < MIN_CLUSTERS or not len(known_R):
        return UNKNOWN
    tail = NORMAL.cdf(math.sqrt(num_clusters / (num_clusters - 1)) * stdtrit(num_clusters - 1, TAIL))
    low, high = np.quantile(known_R, [tail, 1 - tail])
    return Interval(float(low), float(high))


def sign_p_value(samples_R: np.ndarray, num_clusters: int) -> float:
    """Two-sided p of a difference from 0 by the share of resamples beyond 0, in the same expansion as `percentiles`."""
    known_R = samples_R[np.isfinite(samples_R)]
    if num_clusters < MIN_CLUSTERS or not len(known_R):
        return 1.0
    beyond = min(int((known_R <= 0).sum()), int((known_R >= 0).sum()))
    quantile = NORMAL.inv_cdf(min(0.5, (beyond + 1) / (len(known_R) + 1)))
    return float(2 * stdtr(num_clusters - 1, quantile / math.sqrt(num_clusters / (num_clusters - 1))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: each below 0.05 is shown while the chance of any false one stays below 0.05."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [1.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted


class ScoreTable:
    """Scores of several models on the same items, and their resamples.

    Args:
        items: by model and score name, float64 [N, K]: the item's share of the score's sums; all 0 for an item that
            the score is not on (such as a row without a reference).
        metrics: by score name.
        clusters: what items are resampled together, one of N; such as the prompt.
    """

    def __init__(
        self,
        items: Mapping[tuple[str, str], np.ndarray],
        metrics: Mapping[str, Metric],
        clusters: Sequence[Hashable],
        num_resamples: int = NUM_RESAMPLES,
        seed: int = 0,
    ):
        codes = {cluster: code for code, cluster in enumerate(dict.fromkeys(clusters))}
        self.items, self.metrics = items, metrics
        self.clusters_N = np.array([codes[cluster] for cluster in clusters], dtype=np.int64)
        self._num_resamples, self._seed = num_resamples, seed

    def value(self, model: str, metric: str) -> float:
        return float(self.metrics[metric].of_sums(self.items[model, metric].sum(axis=0)))

    def num_clusters(self, metric: str) -> int:
        """Clusters with an item that the score is on."""
        counted = [(item_NK != 0).any(axis=1) for (_, name), item_NK in self.items.items() if name == metric]
        return len(np.unique(self.clusters_N[np.any(counted, axis=0)]))

    def samples(self, model: str, metric: str) -> np.ndarray:
        """The score on every resample, float64 [R]; the same resamples for every model and score."""
        return self._samples[model, metric]

    @cached_property
    def _samples(self) -> dict[tuple[str, str], np.ndarray]:
        # by content: models that did the same have the same samples, to the last bit
        distinct = {item_NK.tobytes(): item_NK for item_NK in self.items.values()}
        sums = [self._sum_clusters(item_NK) for item_NK in distinct.values()]
        resampled = _resampled_sums(np.concatenate(sums, axis=1), self._num_resamples, self._seed)
        ends = np.cumsum([sums_GK.shape[1] for sums_GK in sums])[:-1]
        parts = dict(zip(distinct, np.split(resampled, ends, axis=1), strict=True))
        return {key: self.metrics[key[1]].of_sums(parts[item_NK.tobytes()]) for key, item_NK in self.items.items()}

    def _sum_clusters(self, item_NK: np.ndarray) -> np.ndarray:
        sums_GK = np.zeros((int(self.clusters_N.max()) + 1, item_NK.shape[1]))
        np.add.at(sums_GK, self.clusters_N, item_NK)
        return sums_GK

    def estimate(self, model: str, metric: str) -> Estimate:
        value = self.value(model, metric)
        if not self.metrics[metric].is_proportion:
            return Estimate(value, percentiles(self.samples(model, metric), self.num_clusters(metric)))
        hits_N, clusters_N = self._hits(model, metric)
        effect = design_effect(hits_N - value, clusters_N) if len(hits_N) else 1.0
        return Estimate(value, wilson(float(hits_N.sum()) / effect, len(hits_N) / effect))

    def compare(self, first: str, second: str, metric: str) -> Comparison:
        """`first` minus `second`."""
        difference = self.value(first, metric) - self.value(second, metric)
        compare = self._compare_proportions if self.metrics[metric].is_proportion else self._compare_resampled
        interval, p_value, smallest = compare(first, second, metric)
        comparison = Comparison(first, second, metric, difference, interval, p_value, smallest, Outcome.none)
        return replace(comparison, outcome=_outcome(comparison, self.metrics[metric]))

    def _compare_resampled(self, first: str, second: str, metric: str) -> tuple[Interval, float, float]:
        with np.errstate(invalid="ignore"):
            samples_R = self.samples(first, metric) - self.samples(second, metric)
        num = self.num_clusters(metric)
        interval, p_value = percentiles(samples_R, num), sign_p_value(samples_R, num)
        if math.isnan(interval.low):
            return interval, p_value, math.nan
        error = float(np.std(samples_R[np.isfinite(samples_R)])) * math.sqrt(num / (num - 1))
        return interval, p_value, float(stdtrit(num - 1, 1 - TAIL) + stdtrit(num - 1, POWER)) * error

    def _compare_proportions(self, first: str, second: str, metric: str) -> tuple[Interval, float, float]:
        (first_N, clusters_N), (second_N, _) = self._hits(first, metric), self._hits(second, metric)
        if not len(first_N):
            return UNKNOWN, 1.0, math.nan
        changes_N = first_N - second_N
        effect = design_effect(changes_N - changes_N.mean(), clusters_N)
        only_first, only_second = float((changes_N > 0).sum()) / effect, float((changes_N < 0).sum()) / effect
        num = len(changes_N) / effect
        interval, error = paired_proportions(only_first, only_second, num)
        smallest = max(MCNEMAR_FLOOR / num, (Z + NORMAL.inv_cdf(POWER)) * error)
        return interval, mcnemar(only_first, only_second), smallest

    def _hits(self, model: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Of the items that the score is on: 0 or 1, and the cluster."""
        item_NK = self.items[model, metric]
        counted_N = item_NK[:, 1] != 0
        return item_NK[counted_N, 0], self.clusters_N[counted_N]


def adjust(comparisons: Sequence[Comparison], metrics: Mapping[str, Metric]) -> list[Comparison]:
    """The same comparisons with p-values and outcomes that allow for their number."""
    p_values = holm([comparison.p_value for comparison in comparisons])
    changed = [replace(c, p_value=p) for c, p in zip(comparisons, p_values, strict=True)]
    return [replace(c, outcome=_outcome(c, metrics[c.metric])) for c in changed]


def _outcome(comparison: Comparison, metric: Metric) -> Outcome:
    if comparison.p_value >= 1 - CONFIDENCE or comparison.difference == 0:
        return Outcome.none
    return Outcome.better if (comparison.difference > 0) is metric.higher_is_better else Outcome.worse


def _resampled_sums(sums_GK: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Sums over as many clusters as there are, drawn with replacement; float64 [R, K]."""
    num_clusters, rng = len(sums_GK), np.random.default_rng(seed)
    rows = max(1, CHUNK // num_clusters)
    parts = []
    for start in range(0, num_resamples, rows):
        size = min(rows, num_resamples - start)
        drawn = rng.integers(0, num_clusters, (size, num_clusters)) + num_clusters * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_clusters).reshape(size, num_clusters)
        with np.errstate(invalid="ignore"):  # an infinite loss makes every resample NaN
            parts.append(counts.astype(np.float64) @ sums_GK)
    return np.concatenate(parts)
