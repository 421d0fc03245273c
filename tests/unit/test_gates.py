"""The grammar of conditions, their names, and the verdict."""

import math

import pytest

from pipeline.errors import ConfigError
from pipeline.gates import condition_problems, gate_metrics, judge, table

METRICS = {"base.loss": 2.0, "adapter.loss": 1.0, "adapter.exact_match": 0.5, "forgetting": -0.1, "merge.mean_kl": 3e-9}


@pytest.mark.parametrize(
    ("condition", "left", "right", "passed"),
    [
        ("adapter.loss <= base.loss - 0.1", 1.0, 1.9, True),
        ("adapter.loss<=base.loss-1", 1.0, 1.0, True),
        ("adapter.loss < base.loss - 1", 1.0, 1.0, False),
        ("adapter.loss > 0.9 * base.loss", 1.0, 1.8, False),
        ("forgetting >= -0.1", -0.1, -0.1, True),
        ("merge.mean_kl < 1e-6", 3e-9, 1e-6, True),
        ("merge.mean_kl < .5E-9", 3e-9, 0.5e-9, False),
        ("base.loss - adapter.loss - 0.5 >= 2 * 0.25 + 0", 0.5, 0.5, True),
        ("-adapter.loss + 3 > 1.", 2.0, 1.0, True),
        ("1 < 1.5", 1.0, 1.5, True),
    ],
)
def test_values_of_both_sides(condition, left, right, passed):
    (verdict,) = judge([condition], METRICS)
    assert (verdict.left, verdict.right) == (pytest.approx(left), pytest.approx(right))
    assert verdict.passed is passed
    assert verdict.condition == condition


@pytest.mark.parametrize(
    "condition",
    [
        "", "adapter.loss", "adapter.loss <= ", "<= 1", "1 < 2 < 3", "adapter.loss = 1", "adapter.loss == 1",
        "a <= b c", "adapter.loss <= 1 / 2", "adapter.loss <= (1)", "adapter.loss <= 1 + + 2",
        "adapter.loss <= 1 +", "a * <= 1",
        "__import__('os').system('true') < 1", "adapter.loss <= 1.2.3", "adapter.loss <= 5x", "loss <= 1; x",
        "a <= * 2", "adapter.loss <= 1 - -1", "a => 1",
    ],
)  # fmt: skip
def test_anything_else_is_refused(condition):
    with pytest.raises(ConfigError, match=r"^gate\.conditions: '"):
        judge([condition], METRICS | {"a": 1.0, "b": 1.0, "c": 1.0})
    assert len(condition_problems([condition])) == 1
    assert condition_problems(["adapter.loss <= 1"]) == []


def test_unknown_names_are_refused_with_the_nearest_all_in_one_message():
    with pytest.raises(ConfigError) as raised:
        judge(["adapter.exact_mach >= 0.5", "adapter.loss <= base.los"], METRICS)
    message = str(raised.value)
    assert "no metric is called adapter.exact_mach; did you mean adapter.exact_match?" in message
    assert "no metric is called base.los; did you mean base.loss?" in message


def test_nan_passes_nothing():
    metrics = {"adapter.loss": math.nan}
    assert not any(v.passed for v in judge(["adapter.loss <= 9", "adapter.loss > 0", "0 < adapter.loss"], metrics))


def test_names_come_from_both_files():
    evaluate = {"base": {"loss": 2.0, "num_tokens": 7}, "forgetting": 0.25}
    merge = {"merged": {"loss": 1.5}, "mean_kl": 1e-9, "merge_base": "dequantized", "ok": True}
    assert gate_metrics(evaluate, merge) == {
        "base.loss": 2.0, "base.num_tokens": 7.0, "forgetting": 0.25, "merged.loss": 1.5, "merge.mean_kl": 1e-9,
    }  # fmt: skip


def test_the_table_names_every_condition_with_its_values():
    lines = table(judge(["adapter.loss <= 0.5", "forgetting <= 0"], METRICS)).splitlines()
    assert lines[0].split() == ["MISSED", "adapter.loss", "<=", "0.5", "(1", "against", "0.5)"]
    assert lines[1].startswith("  met     forgetting <= 0 ")
