"""Conditions on a finished model, such as `adapter.exact_match >= base.exact_match + 0.05`: read, never run as code.

    condition  = sum ("<=" | ">=" | "<" | ">") sum
               | NAME "not worse than" NAME "by" NUMBER
    sum        = ["-"] product {("+" | "-") product}
    product    = operand {"*" operand}
    operand    = NUMBER | NAME

A NAME is a metric (`pipeline.gates`). In `merged.bleu not worse than adapter.bleu by 0.5` both names are of one score,
and a model's name alone means its loss: by how much the first may be worse, in the score's own direction.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.labels import MODELS, SCORES

FREE = ("merge", "contamination", "bytes", "harness")  # groups of numbers whose names are known when they are measured
COUNTS = ("num_tokens", "general_num_tokens")
ANSWERED = ("exact_match", "rouge_l", "bleu")
COMPARISONS = ("<=", ">=", "<", ">")
NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])"
NAME = r"[A-Za-z_][\w.]*"
TOKEN = re.compile(rf"\s*(?:(?P<number>{NUMBER})|(?P<name>{NAME})|(?P<sign><=|>=|[<>+*-]))")
NOT_WORSE = re.compile(rf"\s*({NAME})\s+not\s+worse\s+than\s+({NAME})\s+by\s+({NUMBER})\s*")

Factor = float | str  # a number, or a metric's name
Sum = list[tuple[float, list[Factor]]]  # sign and factors of each product


@dataclass(frozen=True)
class Comparison:
    """`left comparison right`; `text` as the user wrote it."""

    text: str
    left: Sum
    comparison: str
    right: Sum


@dataclass(frozen=True)
class NotWorse:
    """`first not worse than second by margin`: names of one score; `text` as the user wrote it."""

    text: str
    first: str
    second: str
    margin: float


def parse_condition(text: str) -> Comparison | NotWorse:
    """Raises: ConfigError: not a condition of the grammar above; the message shows the place."""
    if match := NOT_WORSE.fullmatch(text):
        first, second = (name if "." in name else f"{name}.loss" for name in match.groups()[:2])
        if first.rpartition(".")[2] != second.rpartition(".")[2]:
            raise _wrong(text, f"{first} and {second} are two scores; name the same score of two models")
        return NotWorse(text, first, second, float(match[3]))
    if re.search(r"\bnot\b", text):
        raise _wrong(text, "not of the form `A not worse than B by NUMBER`")
    tokens = _tokens(text)
    places = [i for i, (_, token) in enumerate(tokens) if token in COMPARISONS]
    if len(places) != 1:
        raise _wrong(text, f"{len(places)} comparisons, there must be one of {', '.join(COMPARISONS)}")
    left, right = tokens[: places[0]], tokens[places[0] + 1 :]
    return Comparison(text, _sum(text, left), tokens[places[0]][1], _sum(text, right))


def metric_names(condition: Comparison | NotWorse) -> list[str]:
    """Every metric that the condition names, once."""
    if isinstance(condition, NotWorse):
        return list(dict.fromkeys((condition.first, condition.second)))
    factors = [factor for _, product in condition.left + condition.right for factor in product]
    return list(dict.fromkeys(factor for factor in factors if isinstance(factor, str)))


def condition_problems(conditions: Sequence[str], has_answers: bool = True) -> list[str]:
    """One line for each condition that cannot be parsed or names no metric: known before anything runs.

    Args:
        has_answers: `evaluate.generate`: without answers there are no scores of them.
    """
    found = []
    for text in conditions:
        try:
            names = metric_names(parse_condition(text))
        except ConfigError as error:
            found.append(str(error))
            continue
        problems = [_name_problem(name, has_answers) for name in names]
        found += [f"gate.conditions: '{text}': {problem}" for problem in problems if problem]
    return found


def _name_problem(name: str, has_answers: bool) -> str | None:
    """What is wrong with a name as far as can be said before there are metrics."""
    first, _, score = name.partition(".")
    if first in FREE or name == "forgetting":
        return None
    if first in MODELS and score in (*SCORES, *COUNTS):
        if score in ANSWERED and not has_answers:
            return f"{name} needs answers, and evaluate.generate is false"
        return None
    known = [f"{model}.{key}" for model in MODELS for key in SCORES] + ["forgetting"]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return (
        f"no metric is called {name}; {hint}There are forgetting, MODEL.SCORE with models {', '.join(MODELS)} and "
        f"scores {', '.join(SCORES)}, and the numbers of the metrics files under "
        f"{', '.join(f'{group}.' for group in FREE)}"
    )


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


def _wrong(text: str, problem: str) -> ConfigError:
    return ConfigError(
        f"gate.conditions: '{text}': {problem}. Write such as `adapter.exact_match >= base.exact_match + 0.05` or "
        "`merged.loss not worse than adapter.loss by 0.01`."
    )
