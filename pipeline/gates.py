"""Verdicts on the conditions of a finished model (`pipeline.conditions`), decided on 95 % intervals.

Names of metrics:
    MODEL.SCORE: of the evidence, such as `adapter.rouge_l`; its interval allows for the rows of the test set.
    forgetting: adapter.general_loss - base.general_loss.
    all else: fixed numbers of the metrics files, such as `merge.mean_kl`; they have no interval.
"""

import difflib
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pipeline.conditions import Comparison, NotWorse, Sum, metric_names, parse_condition
from pipeline.errors import ConfigError
from pipeline.evidence import Evidence
from pipeline.schema import Inconclusive
from pipeline.scoring import METRICS
from pipeline.statistics import Interval, percentiles

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
FORGETTING = "forgetting"


class Outcome(StrEnum):
    passed = "passed"
    failed = "failed"
    inconclusive = "inconclusive"


WORDS = {Outcome.passed: "PASSED", Outcome.failed: "FAILED", Outcome.inconclusive: "UNSURE"}


@dataclass(frozen=True)
class Verdict:
    """A condition with the values of its two sides.

    Attributes:
        difference: left - right.
        low, high: its 95 % interval; None where the numbers are fixed, or where there are too few rows for one.
        outcome: passed if the whole interval meets the condition, failed if nothing of it does, inconclusive in
            between and without an interval for too few rows; of fixed numbers, by the difference alone. NaN fails.
    """

    condition: str
    left: float
    right: float
    difference: float
    low: float | None
    high: float | None
    outcome: Outcome


def judge(conditions: Sequence[str], evidence: Evidence, fixed: Mapping[str, float]) -> list[Verdict]:
    """Every condition with its values, interval and outcome.

    Args:
        fixed: further metrics (`gate_metrics`); a name of the evidence goes before them.

    Raises:
        ConfigError: conditions that cannot be parsed and names that are no metric, all in one message.
    """
    problems, parsed = [], []
    for text in conditions:
        try:
            parsed.append(parse_condition(text))
        except ConfigError as error:
            problems.append(str(error))
    metrics = _Metrics(evidence, fixed)
    problems += [f"gate.conditions: '{c.text}': {problem}" for c in parsed for problem in metrics.problems(c)]
    if problems:
        raise ConfigError("\n".join(problems))
    return [_judge(_plain(condition), metrics) for condition in parsed]


def decide(verdicts: Sequence[Verdict], inconclusive: Inconclusive) -> bool:
    """Whether the gate passes: nothing failed, and nothing was inconclusive where `gate.inconclusive` is `fail`."""
    outcomes = {verdict.outcome for verdict in verdicts}
    return Outcome.failed not in outcomes and not (
        inconclusive is Inconclusive.fail and Outcome.inconclusive in outcomes
    )


def gate_metrics(evaluate: Mapping[str, Any], merge: Mapping[str, Any]) -> dict[str, float]:
    """Fixed numbers that conditions may use: of the evaluation as they are, of the merge `merged.*` and `merge.*`."""
    merged = merge.get("merged", {})
    rest = {key: value for key, value in merge.items() if key != "merged"}
    return _numbers({**evaluate, "merged": merged, "merge": rest})


def table(verdicts: Sequence[Verdict]) -> str:
    """A line a condition: the outcome, the condition, both sides, their difference and its interval."""
    rows = [
        (WORDS[v.outcome], v.condition, f"{v.left:.6g}", f"{v.right:.6g}", f"{v.difference:+.4g}", _interval_text(v))
        for v in verdicts
    ]
    first, condition, left, right, difference = (max((len(row[i]) for row in rows), default=0) for i in range(5))
    return "\n".join(
        f"  {r[0]:{first}}  {r[1]:{condition}}  {r[2]:>{left}} against {r[3]:>{right}}  {r[4]:>{difference}}{r[5]}"
        for r in rows
    )


def _interval_text(verdict: Verdict) -> str:
    if verdict.low is not None:
        return f" (95 %: {verdict.low:+.4g} to {verdict.high:+.4g})"
    return " (too few rows for an interval)" if verdict.outcome is Outcome.inconclusive else ""


def _numbers(value: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            found |= _numbers(item, f"{prefix}{key}.")
        elif isinstance(item, int | float) and not isinstance(item, bool):
            found[f"{prefix}{key}"] = float(item)
    return found


class _Metrics:
    """What names stand for: `points` by name; `measured`, by name, the model and score whose samples there are."""

    def __init__(self, evidence: Evidence, fixed: Mapping[str, float]):
        self.evidence = evidence
        self.points = dict(fixed)
        for model in evidence.models:
            self.points |= {f"{model}.{key}": value for key, value in evidence.values(model).items()}
        self.measured = {f"{model}.{score}": (model, score) for model in evidence.models for score in evidence.scores}
        pair = ("adapter.general_loss", "base.general_loss")
        if all(name in self.measured for name in pair):
            self.points[FORGETTING] = self.points[pair[0]] - self.points[pair[1]]
            self.measured[FORGETTING] = ("adapter", "general_loss")

    def samples(self, name: str) -> Any:
        model, score = self.measured[name]
        samples_R = self.evidence.samples(model, score)
        return samples_R - self.evidence.samples("base", score) if name == FORGETTING else samples_R

    def problems(self, condition: Comparison | NotWorse) -> list[str]:
        score = condition.first.rpartition(".")[2] if isinstance(condition, NotWorse) else None
        if score is not None and score not in METRICS:
            return [f"whether more of {score} is better is not known; write it with one of {', '.join(OPERATORS)}"]
        return [self._unknown(name) for name in metric_names(condition) if name not in self.points]

    def _unknown(self, name: str) -> str:
        nearest = difflib.get_close_matches(name, self.points, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        return f"no metric is called {name}; {hint}There are {', '.join(sorted(self.points))}."


def _plain(condition: Comparison | NotWorse) -> Comparison:
    """`A not worse than B by 2` as `A <= B + 2`, or `A >= B - 2` where more is better."""
    if isinstance(condition, Comparison):
        return condition
    higher_is_better = METRICS[condition.first.rpartition(".")[2]].higher_is_better
    bound: Sum = [(1.0, [condition.second]), (-1.0 if higher_is_better else 1.0, [condition.margin])]
    return Comparison(condition.text, [(1.0, [condition.first])], ">=" if higher_is_better else "<=", bound)


def _judge(condition: Comparison, metrics: _Metrics) -> Verdict:
    left, right = (_value(side, metrics.points) for side in (condition.left, condition.right))
    difference = left - right
    interval = _interval(condition, metrics)
    known = interval if interval is not None and not math.isnan(interval.low) else None
    values = [difference, known.low, known.high] if known else [difference]
    meets = [OPERATORS[condition.comparison](value, 0.0) for value in values]
    if math.isnan(difference):
        outcome = Outcome.failed
    elif interval is not known or any(meets) != all(meets):
        outcome = Outcome.inconclusive
    else:
        outcome = Outcome.passed if all(meets) else Outcome.failed
    low, high = (known.low, known.high) if known else (None, None)
    return Verdict(condition.text, left, right, difference, low, high, outcome)


def _interval(condition: Comparison, metrics: _Metrics) -> Interval | None:
    """Of left - right; None where no sample is in it.

    A proportion, and the difference of one between two models, has an interval of its own (`pipeline.statistics`),
    scaled and shifted: resamples of 0 right answers of 49 are all 0.
    """
    coefficients = _coefficients(condition, metrics)
    constant = coefficients.pop((), 0.0)
    if not coefficients:
        return None
    names = sorted({name for product in coefficients for name in product})
    models, all_scores = ([metrics.measured[name][i] for name in names] for i in range(2))
    score, *others = sorted(set(all_scores))
    if METRICS[score].is_proportion and not others and max(map(len, coefficients)) == 1:
        factor = coefficients[(names[0],)]
        if len(names) == 1:
            return _shifted(metrics.evidence.estimate(models[0], score).interval, factor, constant)
        if len(names) == 2 and coefficients[(names[1],)] == -factor:
            return _shifted(metrics.evidence.compare(models[0], models[1], score).interval, factor, constant)
    samples = metrics.points | {name: metrics.samples(name) for name in names}
    differences_R = _value(condition.left, samples) - _value(condition.right, samples)
    return percentiles(differences_R, min(map(metrics.evidence.num_clusters, all_scores)))


def _coefficients(condition: Comparison, metrics: _Metrics) -> dict[tuple[str, ...], float]:
    """Of left - right, by the measured names of each product; () is the constant."""
    found: Counter[tuple[str, ...]] = Counter()
    for side, terms in ((1.0, condition.left), (-1.0, condition.right)):
        for sign, factors in terms:
            names = sorted(factor for factor in factors if isinstance(factor, str) and factor in metrics.measured)
            found[tuple(names)] += side * _value([(sign, [f for f in factors if f not in names])], metrics.points)
    return {names: coefficient for names, coefficient in found.items() if coefficient != 0}


def _shifted(interval: Interval, factor: float, constant: float) -> Interval:
    low, high = sorted((constant + factor * interval.low, constant + factor * interval.high))
    return Interval(low, high)


def _value(terms: Sum, values: Mapping[str, Any]) -> Any:
    """Of one side: a number, or float64 [resamples] where the values are."""
    total: Any = 0.0
    for sign, factors in terms:
        product: Any = sign
        for factor in factors:
            product = product * (values[factor] if isinstance(factor, str) else factor)
        total = total + product
    return total
