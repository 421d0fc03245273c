"""Intervals that cover, tests that seldom err, and what a test set could have shown; the edges of each."""

import math

import numpy as np
import pytest

from pipeline.scoring import METRICS
from pipeline.statistics import Comparison, Interval, Outcome, ScoreTable, adjust, design_effect, wilson


def table_of(clusters=None, num_resamples=1000, **scores) -> ScoreTable:
    """table_of(a_loss=[[nats, tokens], ...]): model a, score loss."""
    items = {tuple(name.split("_", 1)): np.array(rows, dtype=float) for name, rows in scores.items()}
    num = len(next(iter(items.values())))
    return ScoreTable(items, METRICS, range(num) if clusters is None else clusters, num_resamples)


def compare(score: str, first, second, clusters=None) -> Comparison:
    return table_of(clusters, **{f"a_{score}": first, f"b_{score}": second}).compare("a", "b", score)


def hits(flags) -> np.ndarray:
    return np.stack([np.array(flags, dtype=float), np.ones(len(flags))], axis=1)


def losses(rng, num: int) -> np.ndarray:
    """Nats and tokens; the true loss is 1."""
    tokens = rng.integers(2, 60, num)
    return np.stack([tokens * rng.gamma(2.0, 0.5, num), tokens], axis=1)


def changed(rng, rows: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """Another model's losses on the same rows."""
    return rows + np.stack([rows[:, 1] * rng.normal(shift, 0.3, len(rows)), np.zeros(len(rows))], axis=1)


def share_inside(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


def half_as_wide(interval: Interval) -> Interval:
    middle, quarter = (interval.low + interval.high) / 2, (interval.high - interval.low) / 4
    return Interval(middle - quarter, middle + quarter)


@pytest.mark.parametrize(("num", "least"), [(200, 0.92), (8, 0.87)])
def test_the_interval_of_a_loss_covers(num, least):
    """400 test sets. Of 0.95 and 400, a share under 0.92 comes once in 200 times."""
    rng = np.random.default_rng(0)
    found = [table_of(a_loss=losses(rng, num)).estimate("a", "loss").interval for _ in range(400)]
    assert least <= share_inside(found, 1.0) <= 0.98
    assert share_inside(list(map(half_as_wide, found)), 1.0) < 0.75  # negative control


def test_the_interval_of_a_difference_covers_and_is_paired():
    rng = np.random.default_rng(1)
    pairs = [(changed(rng, rows, 0.1), rows) for rows in (losses(rng, 100) for _ in range(300))]
    found = [compare("loss", *pair).interval for pair in pairs]
    assert 0.92 <= share_inside(found, 0.1) <= 0.98
    assert share_inside(list(map(half_as_wide, found)), 0.1) < 0.75
    first = table_of(a_loss=pairs[0][0]).estimate("a", "loss").interval
    assert found[0].high - found[0].low < 0.5 * (first.high - first.low)  # unpaired it would be wider than one model's


def test_rows_of_one_prompt_are_no_independent_rows():
    """40 prompts of 5 rows, alike within a prompt: resampled row by row the intervals are far too narrow."""
    rng, clusters = np.random.default_rng(2), np.repeat(np.arange(40), 5).tolist()
    found, loose = [], []
    for _ in range(200):
        levels = np.repeat(rng.gamma(2.0, 0.5, 40), 5) * rng.uniform(0.9, 1.1, 200)
        rows = np.stack([levels, np.ones(200)], axis=1)
        found.append(table_of(clusters, a_loss=rows).estimate("a", "loss").interval)
        loose.append(table_of(a_loss=rows).estimate("a", "loss").interval)
    assert share_inside(found, 1.0) >= 0.9
    assert share_inside(loose, 1.0) < 0.75


def test_a_proportion_in_clusters_is_widened_by_the_design_effect():
    rng, clusters = np.random.default_rng(3), np.repeat(np.arange(40), 5).tolist()
    found, loose, changes, loose_changes = [], [], [], []
    for _ in range(800):
        first, second = (hits(np.repeat(rng.random(40) < share, 5)) for share in (0.3, 0.5))
        found.append(table_of(clusters, a_exact_match=first).estimate("a", "exact_match").interval)
        loose.append(table_of(a_exact_match=first).estimate("a", "exact_match").interval)
        changes.append(compare("exact_match", first, second, clusters).interval)
        loose_changes.append(compare("exact_match", first, second).interval)
    assert share_inside(found, 0.3) >= 0.92
    assert share_inside(changes, -0.2) >= 0.92
    assert share_inside(loose, 0.3) < 0.75
    assert share_inside(loose_changes, -0.2) < 0.75


def test_the_design_effect_of_known_clusters():
    alone = np.random.default_rng(4).normal(size=60)
    alone -= alone.mean()
    assert design_effect(alone, np.arange(60)) == pytest.approx(1.0)
    assert design_effect(np.repeat(alone, 4), np.repeat(np.arange(60), 4)) == pytest.approx(4.0, rel=0.02)
    assert design_effect(np.zeros(12), np.repeat(np.arange(6), 2)) == 2.0  # nothing to see: as if all alike
    assert design_effect(np.array([1.0, -1, 1, -1]), np.array([0, 0, 1, 1])) == 2.0  # too few clusters to tell
    assert design_effect(np.tile([1.0, -1], 10), np.repeat(np.arange(10), 2)) == 1.0  # never under independent rows


def test_equal_models_in_a_family_seldom_differ():
    """3 scores of 2 models and a base without a true difference, 200 test sets: a false one in under 5 %."""
    rng, scores = np.random.default_rng(5), ("loss", "exact_match", "rouge_l")
    adjusted, alone = [], []
    for _ in range(200):
        made = {}
        for model in "abc":
            made |= {f"{model}_loss": losses(rng, 60), f"{model}_exact_match": hits(rng.random(60) < 0.4)}
            made |= {f"{model}_rouge_l": np.stack([rng.random(60), np.ones(60)], axis=1)}
        table = table_of(num_resamples=2000, **made)
        found = [table.compare(model, "a", score) for model in "bc" for score in scores]
        alone.append(any(comparison.outcome is not Outcome.none for comparison in found))
        adjusted.append(any(comparison.outcome is not Outcome.none for comparison in adjust(found, METRICS)))
    assert np.mean(adjusted) <= 0.05
    assert np.mean(alone) > 0.1  # negative control: one by one


def test_a_test_set_of_five_rows_seldom_shows_what_is_not_there():
    """Signs alone would be all one way once in 16 times, and bootstrapped as sure as can be."""
    rng = np.random.default_rng(6)
    p_values = [compare("loss", changed(rng, rows), rows).p_value for rows in (losses(rng, 5) for _ in range(300))]
    assert np.mean(np.array(p_values) < 0.05) <= 0.08
    rows = losses(rng, 5)
    sure = table_of(num_resamples=5000, a_loss=rows * [2, 1], b_loss=rows).compare("a", "b", "loss")
    assert sure.outcome is Outcome.worse  # negative control: it is possible


@pytest.mark.parametrize("score", ["loss", "exact_match"])
def test_the_smallest_difference_shown_is_shown_in_four_of_five_test_sets(score):
    rng, num = np.random.default_rng(7), 150

    def pair(difference: float) -> tuple[np.ndarray, np.ndarray]:
        if score == "loss":
            rows = losses(rng, num)
            return changed(rng, rows, difference), rows
        drawn, changes = rng.random(num), 0.2  # share of rows that change, either way
        up = drawn < (changes + difference) / 2
        return hits(up | (drawn > 0.6)), hits((drawn < changes) & ~up | (drawn > 0.6))

    def power(difference: float) -> float:
        shown = [compare(score, *pair(difference)).outcome is not Outcome.none for _ in range(250)]
        return float(np.mean(shown))

    smallest = float(np.mean([compare(score, *pair(0.0)).smallest_shown for _ in range(30)]))
    assert 0.72 <= power(smallest) <= 0.88
    assert power(smallest / 2) < 0.5  # negative control


def test_better_and_worse_are_in_the_scores_own_direction():
    up, down = np.full((40, 2), 1.0), np.full((40, 2), 1.0)
    up[:, 0] += np.linspace(0.5, 1, 40)
    for score, outcome in (("loss", Outcome.worse), ("rouge_l", Outcome.better)):
        assert compare(score, up, down).outcome is outcome
        assert compare(score, down, up).outcome is (Outcome.better if outcome is Outcome.worse else Outcome.worse)
    assert compare("exact_match", hits([1] * 40), hits([0] * 40)).outcome is Outcome.better
    assert compare("exact_match", hits([1] * 5 + [0] * 35), hits([0] * 40)).outcome is Outcome.none  # 5 of 5: p 0.06


@pytest.mark.parametrize("num", [1, 3, 49])
@pytest.mark.parametrize("score", ["loss", "exact_match"])
def test_models_that_did_the_same_do_not_differ(num, score):
    rng = np.random.default_rng(8)
    rows = losses(rng, num) if score == "loss" else hits(rng.random(num) < 0.5)
    found = compare(score, rows, rows.copy())
    assert (found.difference, found.p_value, found.outcome) == (0.0, 1.0, Outcome.none)
    other = losses(rng, num) if score == "loss" else hits(rng.random(num) < 0.5)
    table = table_of(**{f"a_{score}": rows, f"c_{score}": other, f"b_{score}": rows.copy()})
    assert (table.samples("a", score) == table.samples("b", score)).all()  # to the last bit


def test_all_wrong_and_all_right_are_no_points():
    rows = {"a_exact_match": hits([0] * 49), "b_exact_match": hits([1] * 49)}
    none, everything = (table_of(**rows).estimate(model, "exact_match") for model in "ab")
    assert (none.value, none.interval.low, everything.value, everything.interval.high) == (0.0, 0.0, 1.0, 1.0)
    assert none.interval.high == pytest.approx(1 - everything.interval.low) == pytest.approx(0.0727, abs=1e-4)
    doubled = table_of(np.repeat(np.arange(49), 2).tolist(), a_exact_match=hits([0] * 98))
    assert doubled.estimate("a", "exact_match").interval.high == pytest.approx(none.interval.high)  # 49 prompts


@pytest.mark.parametrize("clusters", [[0], [0] * 40, [0, 1, 2, 3] * 10])
def test_too_few_clusters_say_nothing(clusters):
    rng = np.random.default_rng(9)
    rows = losses(rng, len(clusters))
    found = compare("loss", changed(rng, rows, 5.0), rows, clusters)
    assert math.isnan(found.interval.low)
    assert math.isnan(found.smallest_shown)
    assert (found.p_value, found.outcome) == (1.0, Outcome.none)
    assert math.isnan(table_of(clusters, a_loss=rows).estimate("a", "loss").interval.high)
    right = table_of(clusters, a_exact_match=hits([1] * len(clusters))).estimate("a", "exact_match").interval
    assert right == wilson(len(set(clusters)), len(set(clusters)))
    # negative control: the same rows, each on its own
    if len(clusters) > 1:
        assert compare("loss", changed(rng, rows, 5.0), rows).outcome is Outcome.worse


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_no_difference_and_no_interval(bad):
    rows = losses(np.random.default_rng(10), 40)
    broken = rows.copy()
    broken[7, 0] = bad
    for first, second in ((broken, rows), (rows, broken), (broken, broken)):
        found = compare("loss", first, second)
        assert math.isnan(found.interval.low)
        assert (found.p_value, found.outcome) == (1.0, Outcome.none)
    assert adjust([found, compare("loss", rows + [1, 0] * rows, rows)], METRICS)[1].outcome is Outcome.worse


def test_rows_without_a_reference_are_left_out():
    """One row of 40 has a reference: its score is one figure on every resample, and says nothing of the others."""
    one = np.zeros((40, 2))
    one[3] = [0.5, 1.0]
    table = table_of(a_rouge_l=one, a_exact_match=np.where(one > 0, 1.0, 0.0), a_bleu=np.zeros((40, 10)))
    assert table.value("a", "rouge_l") == 0.5
    assert math.isnan(table.estimate("a", "rouge_l").interval.low)
    assert table.estimate("a", "exact_match").interval == wilson(1, 1)
    assert math.isnan(table.value("a", "bleu"))
    none = table_of(a_exact_match=np.zeros((40, 2)), b_exact_match=np.zeros((40, 2)))
    assert math.isnan(none.estimate("a", "exact_match").value)
    assert math.isnan(none.estimate("a", "exact_match").interval.low)
    assert none.compare("a", "b", "exact_match").outcome is Outcome.none
    some = np.zeros((40, 2))
    some[:12] = np.stack([np.linspace(0, 1, 12), np.ones(12)], axis=1)
    interval = table_of(a_rouge_l=some).estimate("a", "rouge_l").interval
    assert 0.2 < interval.low < 0.5 < interval.high < 0.8


def test_the_chunks_of_resampling_change_nothing(monkeypatch):
    rows = losses(np.random.default_rng(11), 30)
    whole = table_of(a_loss=rows).samples("a", "loss")
    monkeypatch.setattr("pipeline.statistics.CHUNK", 100)
    assert np.allclose(table_of(a_loss=rows).samples("a", "loss"), whole, rtol=1e-12)
