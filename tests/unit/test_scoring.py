"""Task scores: several references, unequal numbers of them, alphabets other than the Latin one."""

import numpy as np
import pytest

from pipeline.scoring import METRICS, answer_sums, bleu_of_sums, bleu_sums, exact_match, rouge_l


def bleu(predictions: list[str], references: list[list[str]]) -> float:
    rows = [bleu_sums(prediction, texts) for prediction, texts in zip(predictions, references, strict=True)]
    return float(bleu_of_sums(np.sum(rows, axis=0)))


def test_exact_match_takes_any_reference_and_ignores_outer_white_space():
    assert exact_match(" Blue Spice is cheap.\n", ["It is cheap.", "Blue Spice is cheap."])
    assert not exact_match("blue spice is cheap.", ["Blue Spice is cheap."])
    assert not exact_match("Blue  Spice", ["Blue Spice"])


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # Lin 2004, section 3.1: the example of S1, S2 and S3
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", [reference]) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", [reference]) == pytest.approx(2 / 4)


def test_rouge_l_takes_the_nearest_reference():
    assert rouge_l("the cat sat", ["a dog ran off", "the cat sat"]) == 1.0
    assert rouge_l("the cat sat", ["a dog ran off"]) == 0.0


@pytest.mark.parametrize("text", ["Η γάτα κάθεται", "кошка сидит на ковре", "Café Brückenstraße"])
def test_rouge_l_reads_every_alphabet(text):
    from rouge_score.rouge_scorer import RougeScorer

    assert rouge_l(text, [text]) == 1.0
    assert rouge_l(text, ["something else"]) == 0.0
    # what the package's own tokenizer makes of the right Greek and Russian answers: nothing (the reason for ours)
    if not set(text) & set("abcdefghijklmnopqrstuvwxyz"):
        assert RougeScorer(["rougeL"]).score(text, text)["rougeL"].fmeasure == 0.0


def test_bleu_is_100_for_a_reference_and_less_otherwise():
    references = [["the quick brown fox jumps over the dog"], ["a small town by the wide river"]]
    assert bleu([row[0] for row in references], references) == pytest.approx(100)
    assert bleu(["the quick brown fox sleeps near a dog", "a small town by the river"], references) < 60


def test_bleu_rows_may_have_different_numbers_of_references():
    inn = ["the inn is near the river bank", "near the river bank is the inn"]
    references = [inn, ["it serves cheap food every day"]]
    answers = ["near the river bank is the inn", "it serves cheap food every day"]
    assert bleu(answers, references) == pytest.approx(100)
    # each row's own references alone count: exchanged rows score next to nothing
    assert bleu(answers, references[::-1]) < 5


def test_bleu_takes_the_length_of_the_nearest_reference_that_the_row_has():
    """A stand-in for a missing reference must not be one: an empty string would be a reference of length 0."""
    answers = ["a b c d e f", "it serves cheap food"]
    references = [["a b c d e f", "a b c d e f g"], ["it serves cheap food every single day"]]
    expected = bleu(answers, [references[0], references[1] * 2])  # the row's own reference again: nothing new
    assert bleu(answers, references) == pytest.approx(expected, abs=1e-9)
    assert expected < 80  # by the brevity penalty alone; a short reference would lift it
    assert bleu(answers, [references[0], [*references[1], "it costs"]]) > expected + 10


def test_a_row_without_a_reference_has_no_bleu_and_no_rouge():
    with pytest.raises(ValueError, match="a row needs one reference or more"):
        bleu_sums("a", [])
    with pytest.raises(ValueError, match="empty"):
        rouge_l("a", [])


def scores_of(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    rows = [answer_sums(*row) for row in zip(predictions, references, strict=True)]
    return {score: float(METRICS[score].of_sums(np.sum([row[score] for row in rows], axis=0))) for score in rows[0]}


def test_scores_of_empty_answers_are_zero():
    assert scores_of(["", ""], [["a b c d"], ["e"]]) == {"exact_match": 0.0, "rouge_l": 0.0, "bleu": 0.0}


def test_scores_are_means_over_the_rows_with_a_reference():
    scores = scores_of(["one two three four", "five"], [["one two three four"], ["six"]])
    assert (scores["exact_match"], scores["rouge_l"]) == (0.5, 0.5)
    assert scores_of(["one two three four", "five", "x"], [["one two three four"], ["six"], []]) == scores
    assert scores_of(["one two three four", "five", "x"], [["one two three four"], ["six"], ["y"]]) != scores
    assert all(np.isnan(value) for value in scores_of(["x"], [[]]).values())


def test_perplexity_is_the_exponential_of_the_loss_and_never_overflows():
    sums = np.array([[20.0, 10.0], [9e9, 10.0]])
    assert METRICS["perplexity"].of_sums(sums) == pytest.approx([np.exp(2.0), np.exp(700.0)])
    assert METRICS["loss"].of_sums(sums) == pytest.approx([2.0, 9e8])
