"""Conditions on a finished model, such as `adapter.exact_match >= base.exact_match + 0.05`.

    condition  = sum ("<=" | ">=" | "<" | ">") sum
    sum        = ["-"] product {("+" | "-") product}
    product    = operand {"*" operand}
    operand    = NUMBER | NAME

A NAME is a metric: `base.loss` or `forgetting` of metrics/evaluate.json, `merged.bleu` or `merge.mean_kl` of
metrics/merge.json.
"""

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])|(?P<name>[A-Za-z_][\w.]*)|(?P<sign><=|>=|[<>+*-]))"
)

Factor = float | str  # a number, or a metric's name
Sum = list[tuple[float, list[Factor]]]  # sign and factors of each product


@dataclass(frozen=True)
class Condition:
    """A parsed condition; `text` as the user wrote it."""

    text: str
    left: Sum
    comparison: str
    right: Sum


@dataclass(frozen=True)
class Verdict:
    """A condition with the values of its two sides."""

    condition: str
    left: float
    right: float
    passed: bool


def parse_condition(text: str) -> Condition:
    """Raises: ConfigError: not a condition of the grammar above; the message shows the place."""
    tokens = _tokens(text)
    places = [i for i, (_, token) in enumerate(tokens) if token in COMPARISONS]
    if len(places) != 1:
        raise _wrong(text, f"{len(places)} comparisons, there must be one of {', '.join(COMPARISONS)}")
    return Condition(text, _sum(text, tokens[: places[0]]), tokens[places[0]][1], _sum(text, tokens[places[0] + 1 :]))


def condition_problems(conditions: Sequence[str]) -> list[str]:
    """One line for each condition that cannot be parsed: known before anything runs."""
    found = []
    for text in conditions:
        try:
            parse_condition(text)
        except ConfigError as error:
            found.append(str(error))
    return found


def judge(conditions: Sequence[str], metrics: Mapping[str, float]) -> list[Verdict]:
    """Every condition with its values.

    A side that is NaN passes nothing.

    Raises:
        ConfigError: conditions that cannot be parsed and names that are no metric, all in one message.
    """
    problems = condition_problems(conditions)
    parsed = [] if problems else [parse_condition(text) for text in conditions]
    for condition in parsed:
        problems += [
            f"gate.conditions: '{condition.text}': {_unknown(name, metrics)}"
            for name in _names(condition)
            if name not in metrics
        ]
    if problems:
        raise ConfigError("\n".join(problems))
    verdicts = []
    for condition in parsed:
        left, right = _value(condition.left, metrics), _value(condition.right, metrics)
        verdicts.append(Verdict(condition.text, left, right, COMPARISONS[condition.comparison](left, right)))
    return verdicts


def gate_metrics(evaluate: Mapping[str, Any], merge: Mapping[str, Any]) -> dict[str, float]:
    """The names that conditions may use: of the evaluation as they are, of the merge `merged.*` and `merge.*`."""
    merged = merge.get("merged", {})
    rest = {key: value for key, value in merge.items() if key != "merged"}
    return _numbers({**evaluate, "merged": merged, "merge": rest})


def table(verdicts: Sequence[Verdict]) -> str:
    """A line a condition: met or MISSED, the values of both sides."""
    width = max((len(v.condition) for v in verdicts), default=0)
    return "\n".join(
        f"  {'met   ' if v.passed else 'MISSED'}  {v.condition:{width}}  ({v.left:.6g} against {v.right:.6g})"
        for v in verdicts
    )


def _numbers(value: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            found |= _numbers(item, f"{prefix}{key}.")
        elif isinstance(item, int | float) and not isinstance(item, bool):
            found[f"{prefix}{key}"] = float(item)
    return found


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens, position = [], 0
    while position < len(text.rstrip()):
        match = TOKEN.match(text, position)
        if match is None:
            raise _wrong(text, f"cannot read '{text[position:].strip()}'")
        assert match.lastgroup is not None
        tokens.append((match.lastgroup, match[match.lastgroup]))
        position = match.end()
    return tokens


def _sum(text: str, tokens: list[tuple[str, str]]) -> Sum:
    if tokens and tokens[0] == ("sign", "-"):
        sign, tokens = -1.0, tokens[1:]
    else:
        sign = 1.0
    terms: Sum = [(sign, [])]
    expect_operand = True
    for kind, token in tokens:
        if expect_operand != (kind != "sign"):
            wanted = "a number or a metric" if expect_operand else "+, - or *"
            raise _wrong(text, f"'{token}' stands where {wanted} should")
        if kind == "sign" and token != "*":
            terms.append((1.0 if token == "+" else -1.0, []))
        elif kind != "sign":
            terms[-1][1].append(float(token) if kind == "number" else token)
        expect_operand = kind == "sign"
    if expect_operand:
        raise _wrong(text, "a number or a metric is missing at the end of a side")
    return terms


def _value(terms: Sum, metrics: Mapping[str, float]) -> float:
    total = 0.0
    for sign, factors in terms:
        product = sign
        for factor in factors:
            product *= metrics[factor] if isinstance(factor, str) else factor
        total += product
    return total


def _names(condition: Condition) -> list[str]:
    factors = [factor for _, product in condition.left + condition.right for factor in product]
    return list(dict.fromkeys(factor for factor in factors if isinstance(factor, str)))


def _unknown(name: str, metrics: Mapping[str, float]) -> str:
    nearest = difflib.get_close_matches(name, metrics, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return f"no metric is called {name}; {hint}There are {', '.join(sorted(metrics))}."


def _wrong(text: str, problem: str) -> ConfigError:
    return ConfigError(
        f"gate.conditions: '{text}': {problem}. Write such as `adapter.exact_match >= base.exact_match + 0.05`."
    )
