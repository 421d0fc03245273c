"""Task scores of generated answers: exact match, ROUGE-L and BLEU, each against one or several references."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

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


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4, 0 to 100, sacrebleu's defaults (13a tokens, case kept, exponential smoothing).

    `references[i]` are those of `predictions[i]`; rows may have different numbers of them.
    Source: Papineni et al. 2002, by sacrebleu (Post 2018).

    Raises:
        ValueError: no rows, another number of predictions than of rows of references, or a row without reference.
    """
    if not predictions or len(predictions) != len(references) or not all(references):
        rows = f"{len(predictions)} predictions and {len(references)} rows of references"
        raise ValueError(f"bleu: {rows}; each row needs one reference or more")
    from sacrebleu.metrics.bleu import BLEU

    # sacrebleu wants the k-th reference of every row as one stream; None marks a row that has fewer.
    width = max(map(len, references))
    streams: list[Any] = [[row[k] if k < len(row) else None for row in references] for k in range(width)]
    return float(BLEU().corpus_score(list(predictions), streams).score)


def task_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`exact_match` and `rouge_l` (means over rows, 0 to 1) and `bleu` (of the corpus, 0 to 100).

    Raises:
        ValueError: as for `bleu`.
    """
    pairs = list(zip(predictions, references, strict=True))
    return {
        "bleu": bleu(predictions, references),
        "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
        "rouge_l": sum(rouge_l(*pair) for pair in pairs) / len(pairs),
    }
