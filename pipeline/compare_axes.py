"""The swept axes of a picture: which one goes where, their values, scales, ticks and colours."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.compare_judged import Judged
from pipeline.compare_points import text_of
from pipeline.compare_text import LABELS
from pipeline.sweep_statistics import Standing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

MAX_TICKS = 12
LOG_RATIO = 8  # an axis whose largest value is so many times its smallest is logarithmic
FAR = 2  # times the best three quarters' range: scores beyond are outside a picture, and outside its colours


def text_at(judged: Judged, i: int, key: str | None) -> str | None:
    """The value of a setting on an axis; None without an axis."""
    return None if key is None else text_of(judged.settings[i].swept.get(key))


def axis_values(judged: Judged, key: str | None) -> list[Any]:
    """Texts of the values that the axis takes, numbers in order; one None without an axis."""
    if key is None:
        return [None]
    found: dict[str, Any] = {text_of(setting.swept.get(key)): setting.swept.get(key) for setting in judged.settings}
    return sorted(found, key=found.__getitem__) if key in numeric_axes(judged) else sorted(found)


def numeric_axes(judged: Judged) -> list[str]:
    """Axes on which every setting has a number."""
    settings = judged.settings
    return [key for key in judged.group.axes if all(_is_number(setting.swept.get(key)) for setting in settings)]


def choose_axis(judged: Judged, preferred: str, taken: Sequence[str | None], most: int) -> str | None:
    """A further axis with at most so many values: the preferred one, else the first."""
    free = [key for key in judged.group.axes if key not in taken and len(axis_values(judged, key)) <= most]
    return preferred if preferred in free else free[0] if free else None


def best_along(judged: Judged, across: str, fixed: Mapping[str | None, Any]) -> dict[Any, int]:
    """By value on the axis `across`, the best setting among those with the fixed values."""
    cells: dict[Any, int] = {}
    for i, setting in enumerate(judged.settings):  # the best first
        if all(text_at(judged, i, key) == value for key, value in fixed.items()):
            cells.setdefault(setting.swept[across], i)
    return cells


def strongest_axis(judged: Judged, most: int) -> str | None:
    """Of the axes with at most so many values, the one whose values' mean scores differ most."""
    ranks = np.argsort(np.argsort(judged.values(judged.score)))  # not the scores: one diverged setting would decide

    def explained(key: str) -> float:
        texts = np.array([text_at(judged, i, key) for i in range(len(ranks))])
        parts = [ranks[texts == text] for text in axis_values(judged, key)]
        return float(sum(len(part) * (part.mean() - ranks.mean()) ** 2 for part in parts))

    few = [key for key in judged.group.axes if len(axis_values(judged, key)) <= most]
    return max(few, key=explained, default=None)


def axis_title(judged: Judged, key: str) -> str:
    return judged.group.titles[judged.group.axes.index(key)]


def label_of(judged: Judged, key: str | None, text: str | None) -> str | None:
    return None if key is None else f"{axis_title(judged, key)} {text}"


def score_title(judged: Judged) -> str:
    title, unit = LABELS[judged.score][0], ", nats a token" if "loss" in judged.score else ""
    return f"test {title}{unit} ({'higher' if judged.higher_is_better else 'lower'} is better)"


def write_head(judged: Judged, figure: "Figure", text: str, best_of: Sequence[str]) -> None:
    """The picture's title; it names the axes of which only the best values are shown."""
    over = [axis_title(judged, key) for key in best_of]
    figure.suptitle(f"{text}; the best of {', '.join(over)}" if over else text, fontsize=9)


def is_logarithmic(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= LOG_RATIO


def scale_across(axes: "Axes", values: Sequence[float]) -> None:
    """Logarithmic where the values call for it; ticks at the values where they are few."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    if is_logarithmic(values):
        axes.set_xscale("log")
    if len(values) <= MAX_TICKS:
        axes.set_xticks(list(values))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text_of(float(value))))


def score_limits(judged: Judged) -> tuple[float, float]:
    """Best and worst score that a picture shows: diverged settings would press the others together."""
    scores = judged.values(judged.score)
    sign = -1 if judged.higher_is_better else 1
    losses = np.array(scores) * sign
    best, typical = float(losses.min()), float(np.quantile(losses, 0.75))
    worst = min(float(losses.max()), best + FAR * (typical - best)) if typical > best else float(losses.max())
    return sign * best, sign * worst


def is_far(judged: Judged, i: int) -> bool:
    """Whether the setting is so much worse that a picture leaves it out."""
    score, worst = judged.values(judged.score)[i], score_limits(judged)[1]
    return score < worst if judged.higher_is_better else score > worst


def limit_scores(axes: "Axes", judged: Judged) -> None:
    """Fits the axis of scores to the intervals that are shown, those of unsteady seeds apart."""
    places = [i for i in range(len(judged.settings)) if not is_far(judged, i)]
    steady = [i for i in places if judged.versus[i].standing is not Standing.unsteady]
    intervals = [judged.estimates[judged.score][i].interval for i in steady]
    ends = [end for interval in intervals for end in (interval.low, interval.high) if math.isfinite(end)]
    if ends:
        room = 0.04 * (max(ends) - min(ends))
        axes.set_ylim(min(ends) - room, max(ends) + room)


def colour_scale(judged: Judged) -> "tuple[str, Normalize]":
    """Name of the colour map, dark for good scores, and what maps a score onto it."""
    from matplotlib.colors import Normalize

    low, high = sorted(score_limits(judged))
    return "viridis_r" if judged.higher_is_better else "viridis", Normalize(low, high, clip=True)


def heights(values: Sequence[Any], is_number: bool) -> np.ndarray:
    """Places from 0 to 1 on an axis of parallel coordinates, float64 [values]."""
    if not is_number:
        texts = sorted(set(values))
        values = [texts.index(value) for value in values]
    elif is_logarithmic(values):
        values = [math.log(value) for value in values]
    low, high = min(values), max(values)
    return np.array([(value - low) / (high - low) if high > low else 0.5 for value in values])


def ticks(values: Sequence[Any], places: np.ndarray) -> list[tuple[str, float]]:
    """Texts and places of an axis of parallel coordinates: every value, or both ends of many."""
    found = {
        f"{value:,}" if isinstance(value, int) else text_of(value): float(place)
        for value, place in zip(values, places, strict=True)
    }
    if len(found) > MAX_TICKS:
        found = {text: place for text, place in found.items() if place in (places.min(), places.max())}
    return list(found.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
