"""The settings of a sweep judged by one score: the best, those not shown to be worse, the smallest of these."""

import json
import math
from functools import cached_property
from typing import Any

from pipeline.compare_points import Group, Setting, text_of
from pipeline.scoring import METRICS
from pipeline.sweep_statistics import Standing

VALIDATION = "validation_loss"


class Judged:
    """The settings of one group, judged by one score.

    The best setting is chosen by validation loss where the test loss is what decides, so that the test rows have no
    part in the choice; there is no validation of other scores, so that these choose on the test rows themselves.

    Attributes:
        settings: the best `score` first; lists below are in this order.
        estimates: by score; over test rows and seeds.
        chosen_by: `validation_loss`, or the score.
        best: place of the best setting.
        versus: each setting beside the best.
        equals: places of the best and of all that are not shown to be worse.
        smallest: of these, the place of the one with the fewest trainable parameters, then the lowest validation loss.
        is_unsteady: the best setting's own seeds differ far more than those of others.
        has_seeds: some setting has two seeds or more.
    """

    def __init__(self, group: Group, score: str):
        self.group, self.score = group, score
        compared = {name: group.compare(name) for name in group.scores}
        decisive = compared[score]
        sign = -1 if decisive.higher_is_better else 1
        order = sorted(range(len(group.settings)), key=lambda i: sign * decisive.means[i])
        self.settings = [group.settings[i] for i in order]
        self.estimates = {name: [scores.estimate(i) for i in order] for name, scores in compared.items()}
        self.has_seeds = decisive.spread.own is not None
        by_validation = score == "loss" and _same_validation(group)
        self.chosen_by = VALIDATION if by_validation else score
        places = range(len(order))
        self.best = min(places, key=lambda i: self.settings[i].mean(VALIDATION)) if by_validation else 0
        self.is_unsteady = order[self.best] in decisive.spread.unsteady
        versus = decisive.versus(order[self.best])
        self.versus = [versus[i] for i in order]
        self.equals = [i for i in places if self.versus[i].standing not in (Standing.worse, Standing.unsteady)]
        self.smallest = min(self.equals, key=lambda i: (self.parameters(i), self.settings[i].mean(VALIDATION)))

    @property
    def higher_is_better(self) -> bool:
        return self.score in METRICS and METRICS[self.score].higher_is_better

    @property
    def scores(self) -> list[str]:
        """The one that decides first."""
        return [self.score, *(score for score in self.group.scores if score != self.score)]

    def values(self, score: str) -> list[float]:
        return [estimate.value for estimate in self.estimates[score]]

    def parameters(self, i: int) -> int:
        return int(self.settings[i].any_point.train["trainable_parameters"])

    def peak_memory(self, i: int) -> int:
        """Bytes, the most of its seeds."""
        return max(int(point.train["peak_memory_bytes"]) for point in self.settings[i].points.values())

    def describe(self, i: int) -> str:
        values = [text_of(self.settings[i].swept.get(key)) for key in self.group.axes]
        pairs = zip(self.group.titles, values, strict=True)
        return " ".join(f"{title}={value}" for title, value in pairs) or "the only setting"

    @cached_property
    def harness(self) -> dict[str, list[float]]:
        """By `task metric`, the adapter's figure of each setting (mean over seeds); NaN where it was not measured."""
        found = [_harness(setting) for setting in self.settings]
        keys = dict.fromkeys(key for values in found for key in values)
        return {key: [values.get(key, math.nan) for values in found] for key in keys}


def _same_validation(group: Group) -> bool:
    """Whether every point's validation loss is on the same rows: the same data, their number of training rows apart."""
    seen: set[str] = set()
    for point in group.points.values():
        data: dict[str, Any] = {**point.settings["data"], "max_rows": None}
        seen.add(json.dumps([data, point.settings["train"]["eval_max_rows"]], sort_keys=True))
    return len(seen) == 1


def _harness(setting: Setting) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for point in setting.points.values():
        for task, figures in point.evaluate.get("harness", {}).get("adapter", {}).items():
            for metric, value in figures.items():
                if not metric.endswith("_stderr"):
                    sums.setdefault(f"{task} {metric}", []).append(value)
    return {key: sum(values) / len(values) for key, values in sums.items()}
