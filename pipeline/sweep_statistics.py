"""What the points of a sweep allow to conclude, test items and seeds both counted as drawn by chance. Numbers only.

Two or three seeds are too few to resample: the smallest and the largest of a bootstrap of 2 are the 2 themselves. So a
score's variance is the sum of two estimates, and its interval is Student's t with the degrees of freedom of that sum.

    items     the cluster bootstrap of the mean over seeds (`pipeline.statistics`), times G / (G - 1)
    seeds     an analysis of variance over the whole sweep: settings by seeds. What a seed does to all settings alike
              (such as the order of the rows) is one part, what remains is pooled over the settings, each of which has
              too few seeds of its own. A setting whose seeds differ far more than most others' (an F test against the
              median of the settings' variances, at 1 % over all) is kept out of the pool, stands on its own seeds, and
              is called unsteady if these cannot show it to be worse: no mean of such seeds recommends a setting.
    sum       V(items) + V(seeds). Both hold what single seeds do to single items; it is not taken off once, as Cameron,
              Gelbach and Miller (2011) do: with few seeds that costs coverage (0.92 for 0.935, 3 settings of 2 seeds)
    freedom   Satterthwaite (1946)
    shares    Wilson's interval, by Student's t, at the effective number of items p (1 - p) / V (Korn and Graubard 1998)
    the best  multiple comparisons with the best (Hsu 1981; 1996, chapter 4) by Bonferroni: a setting is left out when,
              one-sided, it is shown worse than the reference at 0.05 / (settings - 1). The truly best setting is left
              out in at most 5 % of sweeps, also when the reference was chosen on these very scores.

Measured on made-up sweeps: intervals cover in 0.93 to 0.97 of them from 3 settings on, in 0.91 where 2 seeds move all
settings alike and hardly anything else varies. With 2 settings of 2 seeds the difference's covers in 0.92, and the
truly best is left out in 6 %. A setting whose seeds differ twice as much as the pool's goes unnoticed and is covered in
0.8; where one differs 30 times as much, the truly best is left out in 10 %.

Shape suffixes: G clusters, R resamples.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from scipy.special import chdtri, fdtri, stdtr, stdtrit

from pipeline.statistics import CONFIDENCE, MIN_CLUSTERS, TAIL, UNKNOWN, Estimate, Interval, wilson

UNSTEADY = 0.01  # chance that any of the settings is called unsteady when all are alike
MEDIAN_EFFICIENCY = 0.37  # of the median of variances of 2 values; the more values, the better, up to 0.64
ALPHA = 1 - CONFIDENCE


class Part(NamedTuple):
    """An estimated part of a variance, with the degrees of freedom of the estimate."""

    variance: float
    freedom: float


class Standing(StrEnum):
    """A setting beside the reference."""

    reference = "best"
    same = "same"  # not shown to be worse
    worse = "worse"
    unsteady = "unsteady"  # its seeds differ too much to judge it
    better = "better"  # shown better than the reference, which was chosen by something else


@dataclass(frozen=True)
class Versus:
    """A setting minus the reference in one score.

    Attributes:
        interval: of the difference, this pair taken alone.
        p_value: one-sided, that the setting is no worse than the reference; times the number of comparisons.
    """

    difference: float
    interval: Interval
    p_value: float
    standing: Standing


class SeedSpread:
    """How much a score differs between seeds.

    Args:
        values: by setting, the score by seed.

    Attributes:
        shared: what a seed does to every setting alike; None where it cannot be told from the rest.
        own: by setting, what remains; None where no setting has two seeds.
        unsteady: settings (their places) whose seeds differ far more than those of the others.
    """

    def __init__(self, values: Sequence[Mapping[int, float]]):
        self._values = values
        within = {i: _variance(list(scores.values())) for i, scores in enumerate(values) if len(scores) > 1}
        self.unsteady = _unsteady(within)
        pool = {i: part for i, part in within.items() if i not in self.unsteady}
        self.shared: Part | None = None
        pooled = _pooled(list(pool.values()))
        seeds, num = Counter(frozenset(values[i]) for i in pool).most_common(1)[0] if pool else (frozenset(), 0)
        if num > 1:
            self.shared, pooled = _two_way([values[i] for i in pool if frozenset(values[i]) == seeds], sorted(seeds))
        self._num_crossed = num
        self.own: list[Part] | None = None
        if pooled is not None:
            self.own = [within[i] if i in self.unsteady else pooled for i in range(len(values))]

    def of_mean(self, i: int) -> list[Part]:
        """Of the variance of the setting's mean over its seeds."""
        assert self.own is not None
        num = len(self._values[i])
        if self.shared is None or i in self.unsteady:
            return [_scaled(self.own[i], 1 / num)]
        share = 1 - 1 / self._num_crossed  # `shared` holds the rest
        return [_scaled(self.shared, 1 / num), _scaled(self.own[i], share / num)]

    def of_difference(self, i: int, k: int) -> list[Part]:
        """Of the variance of the difference of two settings' means; what their common seeds do to both cancels."""
        assert self.own is not None
        first, second = self._values[i], self._values[k]
        parts = [_scaled(self.own[i], 1 / len(first)), _scaled(self.own[k], 1 / len(second))]
        if self.own[i] is self.own[k]:
            parts = [_scaled(self.own[i], 1 / len(first) + 1 / len(second))]
        if self.shared is not None:
            weights = [(s in first) / len(first) - (s in second) / len(second) for s in {*first, *second}]
            parts.append(_scaled(self.shared, float(np.square(weights).sum())))
        return parts


class SettingScores:
    """One score of every setting of a sweep.

    Args:
        settings: by setting, the point's name by seed.
        values: the score by point.
        samples: the score on resamples of the items by point, float64 [R]; all points on the same resamples.
        num_clusters: G, independent items that the score is on.
        lowest: that the score can be.
    """

    def __init__(
        self,
        settings: Sequence[Mapping[int, str]],
        values: Mapping[str, float],
        samples: Mapping[str, np.ndarray],
        num_clusters: int,
        higher_is_better: bool,
        is_proportion: bool = False,
        lowest: float = -math.inf,
    ):
        self.num_clusters, self.lowest = num_clusters, lowest
        self.higher_is_better, self.is_proportion = higher_is_better, is_proportion
        self._seeds = [{seed: values[point] for seed, point in points.items()} for points in settings]
        self._samples = [np.mean([samples[point] for point in points.values()], axis=0) for points in settings]
        self.means = [float(np.mean(list(scores.values()))) for scores in self._seeds]
        self.spread = SeedSpread(self._seeds)

    def estimate(self, i: int) -> Estimate:
        """The mean over seeds with its interval over items and seeds; over items alone where no setting has 2 seeds."""
        mean = self.means[i]
        if self.num_clusters < MIN_CLUSTERS:
            return Estimate(mean, UNKNOWN)
        seeds = self.spread.of_mean(i) if self.spread.own is not None else []
        variance, freedom = self._total(self._samples[i], seeds)
        quantile = float(stdtrit(freedom, 1 - TAIL))
        if not self.is_proportion:
            half = quantile * math.sqrt(variance)
            return Estimate(mean, Interval(max(self.lowest, mean - half), mean + half))
        effective = mean * (1 - mean) / variance if variance > 0 and 0 < mean < 1 else float(self.num_clusters)
        return Estimate(mean, wilson(mean * effective, effective, quantile))

    def versus(self, reference: int) -> list[Versus]:
        """Every setting beside the reference."""
        return [self._versus(i, reference) for i in range(len(self.means))]

    def _versus(self, i: int, reference: int) -> Versus:
        difference = self.means[i] - self.means[reference]
        if i == reference:
            return Versus(0.0, Interval(0.0, 0.0), 1.0, Standing.reference)
        if self.num_clusters < MIN_CLUSTERS:
            return Versus(difference, UNKNOWN, 1.0, Standing.same)
        seeds = self.spread.of_difference(i, reference) if self.spread.own is not None else []
        variance, freedom = self._total(self._samples[i] - self._samples[reference], seeds, self.is_proportion)
        worse = -difference if self.higher_is_better else difference
        if variance == 0:  # the same on every item
            return Versus(difference, Interval(difference, difference), 1.0, Standing.same)
        error, num = math.sqrt(variance), len(self.means) - 1
        p_worse, p_better = (min(1.0, num * float(stdtr(freedom, side / error))) for side in (-worse, worse))
        standing = Standing.unsteady if i in self.spread.unsteady else Standing.same
        standing = Standing.worse if p_worse < ALPHA else Standing.better if p_better < ALPHA else standing
        half = float(stdtrit(freedom, 1 - TAIL)) * error
        return Versus(difference, Interval(difference - half, difference + half), p_worse, standing)

    def _total(
        self, samples_R: np.ndarray, seeds: Sequence[Part], is_paired_proportion: bool = False
    ) -> tuple[float, float]:
        """Variance and degrees of freedom of items and seeds together.

        Two proportions on the same items that hardly differ get an item each way more (Bonett and Price 2012).
        """
        num = self.num_clusters
        items = float(np.var(samples_R[np.isfinite(samples_R)])) * num / (num - 1)
        if is_paired_proportion and items > 0:
            items += 2 / (num + 2) ** 2
        parts = [Part(items, num - 1), *seeds]
        variance = sum(part.variance for part in parts)
        below = sum(part.variance**2 / part.freedom for part in parts)
        return variance, variance**2 / below if below else float(num - 1)


def _variance(values: Sequence[float]) -> Part:
    return Part(float(np.var(values, ddof=1)), len(values) - 1)


def _scaled(part: Part, factor: float) -> Part:
    return Part(part.variance * factor, part.freedom)


def _pooled(parts: Sequence[Part]) -> Part | None:
    freedom = sum(part.freedom for part in parts)
    return Part(sum(part.variance * part.freedom for part in parts) / freedom, freedom) if freedom else None


def _unsteady(within: Mapping[int, Part]) -> set[int]:
    """Settings whose variance is too large for what half of the others have."""
    if not within:
        return set()
    typical = float(np.median([part.variance * part.freedom / chdtri(part.freedom, 0.5) for part in within.values()]))
    freedom = MEDIAN_EFFICIENCY * sum(part.freedom for part in within.values())
    limits = {i: typical * fdtri(part.freedom, freedom, 1 - UNSTEADY / len(within)) for i, part in within.items()}
    return {i for i, part in within.items() if 0 < limits[i] < part.variance}


def _two_way(rows: Sequence[Mapping[int, float]], seeds: Sequence[int]) -> tuple[Part, Part]:
    """What seeds do to all settings alike (their mean squares / settings), and the residual mean square."""
    table = np.array([[row[seed] for seed in seeds] for row in rows])
    num_settings, num_seeds = table.shape
    by_seed = table.mean(axis=0)
    residuals = table - table.mean(axis=1, keepdims=True) - by_seed + table.mean()
    freedom = (num_settings - 1) * (num_seeds - 1)
    return _variance(by_seed.tolist()), Part(float((residuals**2).sum()) / freedom, freedom)
