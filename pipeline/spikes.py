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


def _zscore(value: float, recent: Sequence[float]) -> float:
    mean = statistics.fmean(recent)
    deviation = max(statistics.pstdev(recent, mean), LEAST_DEVIATION * abs(mean), 1e-12)
    return (value - mean) / deviation
