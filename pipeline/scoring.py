"""Task scores of generated answers: exact match, ROUGE-L and BLEU, each against one or several references."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from pipeline.statistics import Metric

WORDS = re.compile(r"[^\W_]+")


class UnicodeWords:
    """rouge-score's own tokenizer for every alphabet: lower case, runs of letters and digits.

    The package's default keeps `[a-z0-9]` alone, so that right answers in Greek or Russian score 0 and `Café` is cut
    at its accent. On ASCII text the two agree.
    """

    def tokenize(self, text: str) -> list[str]:
        return WORDS.findall(text.lower())


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: about a second, for those who generate only

    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=UnicodeWords())


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction equals a reference, white space at both ends apart."""
    return prediction.strip() in {reference.strip() for reference in references}


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1, 0 to 1, against the nearest reference; words as they are (no stemmer).

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1, by rouge-score.

    Raises:
        ValueError: there is no reference.
    """
    scorer = _rouge_scorer()
    return float(max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references))


@cache
def _bleu_scorer() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU()


def bleu_sums(prediction: str, references: Sequence[str]) -> list[float]:
    """What a row adds to corpus BLEU-4: matching n-grams, n-grams (n from 1 to 4), its length, its reference's length.

    sacrebleu's defaults (13a tokens, case kept). Source: Papineni et al. 2002, by sacrebleu (Post 2018).

    Raises:
        ValueError: there is no reference.
    """
    if not references:
        raise ValueError("bleu: a row needs one reference or more")
    score = _bleu_scorer().corpus_score([prediction], [[reference] for reference in references])
    return [*map(float, score.counts), *map(float, score.totals), float(score.sys_len), float(score.ref_len)]


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU-4, 0 to 100, of summed `bleu_sums`, float64 [..., 10] to [...]; NaN where no row has a reference.

    Exponential smoothing, as sacrebleu's default: the k-th precision that is 0 counts as one match in 2**k.
    """
    counts, totals, length, reference_length = sums[..., :4], sums[..., 4:8], sums[..., 8], sums[..., 9]
    num_zero = np.cumsum(counts == 0, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(counts == 0, 0.5**num_zero, counts) / totals
        penalty = np.exp(np.minimum(0.0, 1.0 - reference_length / length))
        score = 100.0 * penalty * np.exp(np.log(precisions).mean(axis=-1))
    score = np.where(counts.any(axis=-1) & totals.all(axis=-1), score, 0.0)
    return np.where(reference_length > 0, score, np.nan)


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: np.ndarray = sums[..., 0] / sums[..., 1]
    return ratio


def perplexity_of_sums(sums: np.ndarray) -> np.ndarray:
    """exp(loss), at most exp(700): beyond, float64 has no number."""
    perplexity: np.ndarray = np.exp(np.minimum(_ratio(sums), 700.0))
    return perplexity


METRICS = {
    "loss": Metric(_ratio, higher_is_better=False),  # nats and supervised tokens
    "perplexity": Metric(perplexity_of_sums, higher_is_better=False),  # of the sums of loss
    "exact_match": Metric(_ratio, higher_is_better=True, is_proportion=True),
    "rouge_l": Metric(_ratio, higher_is_better=True),
    "bleu": Metric(bleu_of_sums, higher_is_better=True),
    "general_loss": Metric(_ratio, higher_is_better=False),
}


def answer_sums(prediction: str, references: Sequence[str]) -> dict[str, list[float]]:
    """What a row's answer adds to the sums of `exact_match`, `rouge_l` and `bleu`; nothing without a reference."""
    if not references:
        return {"exact_match": [0.0, 0.0], "rouge_l": [0.0, 0.0], "bleu": [0.0] * 10}
    return {
        "exact_match": [float(exact_match(prediction, references)), 1.0],
        "rouge_l": [rouge_l(prediction, references), 1.0],
        "bleu": bleu_sums(prediction, references),
    }
