"""Our scores against rouge-score and sacrebleu used as their own pages show."""

import random

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from pipeline.scoring import UnicodeWords, bleu, rouge_l

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


def test_bleu_of_unequal_references_sums_the_statistics_of_each_row():
    """Corpus BLEU is a function of counts summed over rows: taken from sacrebleu a row at a time."""
    predictions = sentences(12, 10)
    rows = [sentences(1 + i % 4, 20 + i) for i in range(12)]
    metric = sacrebleu.BLEU()
    pairs = zip(predictions, rows, strict=True)
    counts = [metric._extract_corpus_statistics([p], [[r] for r in row])[0] for p, row in pairs]
    expected = metric._aggregate_and_compute(counts).score
    assert bleu(predictions, rows) == pytest.approx(expected, abs=1e-9)
    first_only = [row[:1] for row in rows]
    assert bleu(predictions, first_only) != pytest.approx(expected, abs=1e-9)
