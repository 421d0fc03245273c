"""Our scores against rouge-score and sacrebleu used as their own pages show."""

import random

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from pipeline.scoring import UnicodeWords, bleu_of_sums, bleu_sums, rouge_l

WORDS = [
    "the",
    "a",
    "Spice",
    "inn,",
    "river's",
    "near",
    "5",
    "out-of",
    "10",
    "£20",
    "cheap?",
    "food.",
    "is",
    "in_it",
    "and",
]


def sentences(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(4, 14))) for _ in range(count)]


def sums_of(predictions: list[str], rows: list[list[str]]) -> np.ndarray:
    return np.array([bleu_sums(*row) for row in zip(predictions, rows, strict=True)])


def bleu(predictions: list[str], rows: list[list[str]]) -> float:
    return float(bleu_of_sums(sums_of(predictions, rows).sum(axis=0)))


def test_rouge_l_is_rouge_scores_on_ascii_text():
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = list(zip(sentences(50, 0), sentences(50, 1), strict=True))
    for prediction, reference in pairs:
        assert rouge_l(prediction, [reference]) == scorer.score(reference, prediction)["rougeL"].fmeasure
    with_stems = RougeScorer(["rougeL"], use_stemmer=True).score("the inns serve", "the inn serves")["rougeL"].fmeasure
    assert with_stems != rouge_l("the inn serves", ["the inns serve"])


def test_rouge_l_of_several_references_is_score_multi():
    scorer = RougeScorer(["rougeL"], tokenizer=UnicodeWords())
    references = sentences(5, 2)
    for prediction in sentences(20, 3):
        assert rouge_l(prediction, references) == scorer.score_multi(references, prediction)["rougeL"].fmeasure


@pytest.mark.parametrize("num_references", [1, 3])
def test_bleu_is_sacrebleus(num_references):
    predictions = sentences(30, 4)
    streams = [sentences(30, 5 + k) for k in range(num_references)]
    rows = [list(row) for row in zip(*streams, strict=True)]
    expected = sacrebleu.corpus_bleu(predictions, streams).score
    assert bleu(predictions, rows) == pytest.approx(expected, abs=1e-9)
    assert 0 < expected < 100
    assert bleu(predictions, rows[1:] + rows[:1]) != pytest.approx(expected, abs=1e-9)


def streams_of(rows: list[list[str]]) -> list[list[str | None]]:
    """The k-th reference of every row, as sacrebleu wants them; None marks a row that has fewer."""
    return [[row[k] if k < len(row) else None for row in rows] for k in range(max(map(len, rows)))]


def test_bleu_of_resamples_is_sacrebleus_with_unequal_references():
    """Every third answer is empty, some are of few words: counts of 0 and no n-grams of an order at all."""
    predictions = [text if i % 3 else "" for i, text in enumerate(sentences(12, 10))]
    predictions[1], predictions[5] = "nothing alike", "the"
    rows = [sentences(1 + i % 4, 20 + i) for i in range(12)]
    sums, generator, scores = sums_of(predictions, rows), np.random.default_rng(0), []
    for size in [1, 2, 3, 12] * 20:
        drawn = generator.integers(0, 12, size)
        chosen = [rows[i] for i in drawn]
        expected = sacrebleu.corpus_bleu([predictions[i] for i in drawn], streams_of(chosen)).score
        scores.append(expected)
        assert float(bleu_of_sums(sums[drawn].sum(axis=0))) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert sum(score == 0 for score in scores) > 5
    assert sum(score > 0 for score in scores) > 30
    first_only = [row[:1] for row in rows]
    assert bleu(predictions, first_only) != pytest.approx(bleu(predictions, rows), abs=1e-9)
    several = bleu_of_sums(np.stack([sums, sums[::-1]]).cumsum(axis=1))  # of any shape
    assert several.shape == (2, 12)
    assert several[0, -1] == pytest.approx(bleu(predictions, rows))


@pytest.mark.parametrize(
    ("prediction", "references", "num_zero"),
    [
        ("the cat sat on a mat", ["the cat sat under one mat"], 1),  # no 4-gram matches
        ("the cat lay on a mat", ["cat the on lay mat a"], 3),  # words alone
        ("x y z w", ["a b c d"], 4),
        ("the cat sat", ["the cat sat"], 1),  # no 4-gram at all
        ("", ["a b c d"], 4),
    ],
)
def test_smoothing_of_zero_counts_is_sacrebleus(prediction, references, num_zero):
    sums = np.array(bleu_sums(prediction, references))
    assert (sums[:4] == 0).sum() == num_zero
    expected = sacrebleu.corpus_bleu([prediction], [references]).score
    assert float(bleu_of_sums(sums)) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    if expected:
        unsmoothed = sacrebleu.corpus_bleu([prediction], [references], smooth_method="none").score
        assert unsmoothed != pytest.approx(expected)
