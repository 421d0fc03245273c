"""Steps far off what the last ones were: their z-score."""

import statistics
from collections.abc import Sequence

SPIKE_WINDOW = 50  # steps that a new one is compared with
FEWEST = 20  # no judgement on less
LEAST_DEVIATION = 0.05  # of the mean: where the last steps hardly differ, small steps aside are no spike


def highest_zscore(values: tuple[float, float], recent: Sequence[tuple[float, float]]) -> float:
    """The highest z-score of a step's loss and gradient norm among the recent ones; 0 while these are few."""
    if len(recent) < FEWEST:
        return 0.0
    return max(_zscore(value, [pair[i] for pair in recent]) for i, value in enumerate(values))


def clamped(values: tuple[float, float], recent: Sequence[tuple[float, float]], zscore: float) -> tuple[float, float]:
    """The step's values, cut down to the z-score: what a spike leaves among the recent ones.

    A single spike hardly moves them; where the training has changed for good, they follow, and spikes end.
    """
    limits = [statistics.fmean(column) + zscore * _deviation(column) for column in zip(*recent, strict=True)]
    return min(values[0], limits[0]), min(values[1], limits[1])


def _zscore(value: float, recent: Sequence[float]) -> float:
    return (value - statistics.fmean(recent)) / _deviation(recent)


def _deviation(recent: Sequence[float]) -> float:
    mean = statistics.fmean(recent)
    return max(statistics.pstdev(recent, mean), LEAST_DEVIATION * abs(mean), 1e-12)
