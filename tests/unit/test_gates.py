"""The grammar of conditions, their names, and the verdict on intervals."""

import math
import subprocess
import sys

import numpy as np
import pytest

from pipeline.conditions import condition_problems
from pipeline.config import compose_config
from pipeline.errors import ConfigError
from pipeline.evidence import Evidence, ModelItems, join_items
from pipeline.gates import Outcome, decide, gate_metrics, judge, table
from pipeline.schema import Inconclusive
from pipeline.statistics import paired_proportions, wilson

FIXED = {"ten": 10.0, "two": 2.0, "merge.mean_kl": 3e-9, "merge.nan": math.nan}
PASSED, FAILED, INCONCLUSIVE = Outcome.passed, Outcome.failed, Outcome.inconclusive


def model_items(num: int, loss: float, right: int, general: float = 1.0, spread: float = 0.0) -> ModelItems:
    """Rows with these mean scores; `spread`: of this model's loss from row to row, beside what all models share."""
    hard = np.linspace(-0.9, 0.9, num)
    own = spread * np.where(np.arange(num) % 2, 1.0, -1.0)
    test = [
        {
            "row_id": f"t:{i}",
            "cluster": f"t:{i}",
            "sums": {
                "loss": [5 * (loss + hard[i] + own[i]), 5],
                "exact_match": [float(i < right), 1],
                "rouge_l": [0.5 + (i < right) / 4 + hard[i] / 5, 1],
            },
        }
        for i in range(num)
    ]
    rows = [
        {"row_id": f"g:{i}", "cluster": f"g:{i}", "sums": {"general_loss": [general + hard[i], 1]}} for i in range(num)
    ]
    return ModelItems(test, rows, [])


def evidence_of(num: int = 100, **models) -> Evidence:
    made = {name: model_items(num, **scores) for name, scores in models.items()}
    return Evidence(join_items(made), num_resamples=1000)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return evidence_of(
        base={"loss": 2.0, "right": 0},
        adapter={"loss": 1.0, "right": 40, "general": 1.3, "spread": 0.5},
        merged={"loss": 1.0, "right": 40, "general": 1.3, "spread": 0.5},
        requantized={"loss": 1.02, "right": 38, "general": 1.3, "spread": -0.5},
    )


@pytest.mark.parametrize(
    ("condition", "left", "right", "outcome"),
    [
        ("two <= ten - 8", 2.0, 2.0, PASSED),
        ("two<=ten-8", 2.0, 2.0, PASSED),
        ("two < ten - 8", 2.0, 2.0, FAILED),
        ("two > 0.9 * ten", 2.0, 9.0, FAILED),
        ("merge.mean_kl < 1e-6", 3e-9, 1e-6, PASSED),
        ("merge.mean_kl < .5E-9", 3e-9, 0.5e-9, FAILED),
        ("ten - two - 7.5 >= 2 * 0.25 + 0", 0.5, 0.5, PASSED),
        ("-two + 3 > 1.", 1.0, 1.0, FAILED),
        ("1 < 1.5", 1.0, 1.5, PASSED),
        ("ten * two * 2 >= 40", 40.0, 40.0, PASSED),
    ],
)
def test_fixed_numbers_are_decided_on_the_point(evidence, condition, left, right, outcome):
    (verdict,) = judge([condition], evidence, FIXED)
    assert (verdict.left, verdict.right) == (pytest.approx(left), pytest.approx(right))
    assert (verdict.low, verdict.high, verdict.outcome) == (None, None, outcome)
    assert verdict.condition == condition


@pytest.mark.parametrize(
    ("condition", "outcome"),
    [
        ("adapter.loss <= base.loss - 0.1", PASSED),
        ("adapter.loss >= base.loss - 0.1", FAILED),
        ("adapter.loss <= base.loss - 1", INCONCLUSIVE),  # the point itself
        ("adapter.loss <= base.loss - 0.95", INCONCLUSIVE),  # the point meets it, the test set does not show it
        ("adapter.loss <= base.loss - 1.05", INCONCLUSIVE),
        ("adapter.loss <= base.loss - 1.2", FAILED),
        ("adapter.loss <= 0.7 * base.loss", PASSED),
        ("adapter.loss * two <= 1.6 * base.loss", PASSED),
        ("merged.loss <= adapter.loss", PASSED),  # the same on every row: no doubt
        ("merged.loss < adapter.loss", FAILED),
        ("requantized.loss <= adapter.loss + 0.02", INCONCLUSIVE),
        ("adapter.exact_match >= 0.3", PASSED),
        ("adapter.exact_match >= 0.35", INCONCLUSIVE),
        ("adapter.exact_match >= 0.45", INCONCLUSIVE),
        ("adapter.exact_match >= 0.6", FAILED),
        ("adapter.exact_match >= base.exact_match + 0.2", PASSED),
        ("adapter.exact_match >= base.exact_match + 0.4", INCONCLUSIVE),
        ("adapter.exact_match <= base.exact_match", FAILED),
        ("adapter.rouge_l > base.rouge_l", PASSED),
        ("forgetting <= 0.5", PASSED),
        ("forgetting <= 0.1", FAILED),
        ("forgetting + adapter.loss <= 1.3", INCONCLUSIVE),
        ("adapter.loss - adapter.loss <= 0", PASSED),
        ("adapter.num_tokens >= 500", PASSED),
        ("merge.nan <= 1", FAILED),
        ("merge.nan >= adapter.loss", FAILED),
        ("0 < merge.nan", FAILED),
    ],
)
def test_scores_are_decided_on_their_interval(evidence, condition, outcome):
    assert judge([condition], evidence, FIXED)[0].outcome is outcome


@pytest.mark.parametrize(
    ("condition", "outcome", "bound"),
    [
        ("merged not worse than adapter by 0.01", PASSED, 1.01),
        ("merged.loss not worse than adapter.loss by 0", PASSED, 1.0),
        ("adapter not worse than base by 0.1", PASSED, 2.1),
        ("base not worse than adapter by 0.1", FAILED, 1.1),
        ("base not worse than adapter by 2", PASSED, 3.0),
        ("requantized not worse than adapter by 0.02", INCONCLUSIVE, 1.02),
        ("adapter.exact_match  not worse than base.exact_match by .1", PASSED, -0.1),
        ("base.exact_match not worse than adapter.exact_match by 0.1", FAILED, 0.3),
        ("merged.exact_match not worse than adapter.exact_match by 0.01", INCONCLUSIVE, 0.39),  # 100 rows cannot tell
        ("merged.exact_match not worse than adapter.exact_match by 0.05", PASSED, 0.35),
        ("base.rouge_l not worse than adapter.rouge_l by 1e-1", INCONCLUSIVE, 0.5),
        ("adapter.general_loss not worse than base.general_loss by 0.5", PASSED, 1.5),
    ],
)
def test_not_worse_is_in_the_scores_own_direction(evidence, condition, outcome, bound):
    (verdict,) = judge([condition], evidence, FIXED)
    assert (verdict.outcome, verdict.condition) == (outcome, condition)
    assert verdict.right == pytest.approx(bound)


def test_proportions_have_their_own_intervals(evidence):
    """None of the base's answers is right: on every resample too, so that percentiles would be a point."""
    conditions = ["base.exact_match <= 0.05", "1 - 2 * adapter.exact_match <= 1",
                  "adapter.exact_match + 0.1 >= requantized.exact_match"]  # fmt: skip
    single, scaled, pair = judge(conditions, evidence, FIXED)
    assert (single.low, single.high) == pytest.approx((-0.05, wilson(0, 100).high - 0.05))
    assert single.outcome is PASSED
    assert judge(["base.exact_match <= 0.01"], evidence, FIXED)[0].outcome is INCONCLUSIVE
    assert set(evidence.samples("base", "exact_match")) == {0.0}
    expected = wilson(40, 100)
    assert (scaled.low, scaled.high) == pytest.approx((-2 * expected.high, -2 * expected.low))
    expected, _ = paired_proportions(2, 0, 100)
    assert (pair.low, pair.high) == pytest.approx((0.1 + expected.low, 0.1 + expected.high))
    # another factor on either side: resampled
    assert judge(["adapter.exact_match >= 2 * base.exact_match"], evidence, FIXED)[0].outcome is PASSED


def test_intervals_are_paired(evidence):
    """Rows differ in hardness by far more than the models do; unpaired, nothing could be told."""
    found = judge(["adapter.loss <= 2", "adapter.loss <= base.loss"], evidence_of(
        base={"loss": 2.0, "right": 0}, adapter={"loss": 1.95, "right": 0, "spread": 0.05}
    ), FIXED)  # fmt: skip
    assert [verdict.outcome for verdict in found] == [INCONCLUSIVE, PASSED]
    assert found[1].low < found[1].difference < found[1].high < 0


def test_too_few_rows_are_inconclusive():
    few = evidence_of(num=3, base={"loss": 2.0, "right": 0}, adapter={"loss": 1.0, "right": 3})
    verdicts = judge(["adapter.loss <= base.loss", "adapter.loss >= base.loss", "ten > 1"], few, FIXED)
    assert [verdict.outcome for verdict in verdicts] == [INCONCLUSIVE, INCONCLUSIVE, PASSED]
    assert (verdicts[0].low, verdicts[0].high) == (None, None)
    assert "too few rows" in table(verdicts).splitlines()[0]
    assert "too few rows" not in table(verdicts).splitlines()[2]


@pytest.mark.parametrize(
    "condition",
    [
        "", "adapter.loss", "adapter.loss <= ", "<= 1", "1 < 2 < 3", "adapter.loss = 1", "adapter.loss == 1",
        "ten <= two ten", "adapter.loss <= 1 / 2", "adapter.loss <= (1)", "adapter.loss <= 1 + + 2",
        "adapter.loss <= 1 +", "ten * <= 1", "__import__('os').system('touch /tmp/gate') < 1",
        "__import__('os') not worse than base by 1", "adapter not worse than base by __import__('os')",
        "adapter.loss <= 1.2.3", "adapter.loss <= 5x", "loss <= 1; x", "ten <= * 2", "adapter.loss <= 1 - -1",
        "ten => 1", "adapter not worse than base", "adapter not worse than base by -1", "adapter not worse than 2 by 1",
        "adapter not worse than base by 1 + 1", "adapter not worse then base by 1", "adapter is worse than base by 1",
        "adapter.bleu not worse than base.rouge_l by 1", "adapter.bleu not worse than base by 1",
        "adapter not worse than base by 0.1 <= 1", "not worse than base by 1",
    ],
)  # fmt: skip
def test_anything_else_is_refused(evidence, condition):
    with pytest.raises(ConfigError, match=r"^gate\.conditions: '"):
        judge([condition], evidence, FIXED)
    assert len(condition_problems([condition])) == 1
    assert condition_problems(["adapter.loss <= 1", "merged not worse than adapter by 1e-3"]) == []


def test_unknown_names_are_refused_with_the_nearest_all_in_one_message(evidence):
    conditions = ["adapter.exact_mach >= 0.5", "adapter.loss <= base.los", "mergd not worse than adapter by 1"]
    with pytest.raises(ConfigError) as raised:
        judge([*conditions, "merge.mean_kl not worse than merge.mean_kl by 1"], evidence, FIXED)
    message = str(raised.value)
    assert "no metric is called adapter.exact_mach; did you mean adapter.exact_match?" in message
    assert "no metric is called base.los; did you mean base.loss?" in message
    assert "no metric is called mergd.loss; did you mean merged.loss?" in message
    assert "whether more of mean_kl is better is not known" in message
    assert judge(["adapter.exact_match >= 0.1"], evidence, FIXED)


@pytest.mark.parametrize(
    ("conditions", "passes"),
    [
        ([], {"fail", "warn", "ignore"}),
        (["ten > 1", "adapter.loss < 2"], {"fail", "warn", "ignore"}),
        (["ten > 1", "adapter.loss < 1"], {"warn", "ignore"}),
        (["adapter.loss < 1", "ten < 1"], set()),
        (["ten < 1"], set()),
    ],
)
def test_the_gate_passes_with_nothing_failed(evidence, conditions, passes):
    verdicts = judge(conditions, evidence, FIXED)
    assert {str(policy) for policy in Inconclusive if decide(verdicts, policy)} == passes


def test_names_come_from_both_files_and_the_evidence_goes_first(evidence):
    evaluate = {"base": {"loss": 99.0, "num_tokens": 7}, "forgetting": 99.0}
    merge = {"merged": {"loss": 1.5}, "mean_kl": 1e-9, "bytes": {"merged": 8}, "merge_base": "dequantized", "ok": True}
    fixed = gate_metrics(evaluate, merge)
    assert fixed == {
        "base.loss": 99.0, "base.num_tokens": 7.0, "forgetting": 99.0, "merged.loss": 1.5, "merge.mean_kl": 1e-9,
        "merge.bytes.merged": 8.0,
    }  # fmt: skip
    verdicts = judge(["base.loss < 3", "forgetting < 3", "merge.bytes.merged <= 8"], evidence, fixed)
    assert [(v.outcome, v.low is None) for v in verdicts] == [(PASSED, False), (PASSED, False), (PASSED, True)]


def test_the_table_is_aligned_and_names_every_condition(evidence):
    conditions = ["adapter.loss <= 0.5", "forgetting <= 2", "adapter.loss < 1", "ten > 1"]
    lines = table(judge(conditions, evidence, FIXED)).splitlines()
    assert [line.split()[0] for line in lines] == ["FAILED", "PASSED", "UNSURE", "PASSED"]
    assert [line[10:29].strip() for line in lines] == conditions
    assert len({line.index(" against ") for line in lines}) == 1
    assert lines[0].split()[4:10] == ["1", "against", "0.5", "+0.5", "(95", "%:"]
    assert lines[3].endswith("+9")
    assert table([]) == ""


def test_conditions_are_read_without_heavy_imports():
    """The check stage reads them before anything else."""
    code = "import pipeline.conditions, sys; print(sorted({'numpy', 'torch', 'scipy', 'pipeline.gates'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("adapter.exact_mach >= 0.5", "did you mean adapter.exact_match?"),
        ("adaptor.loss <= 1", "did you mean adapter.loss?"),
        ("forgeting <= 1", "did you mean forgetting?"),
        ("loss <= 1", "no metric is called loss"),
        ("adapter.bleu >= 1", "needs answers, and evaluate.generate is false"),
        ("merged not worse than adaptr by 0.1", "did you mean adapter.loss?"),
        ("adapter.loss <= base.loss - 0.1", None),
        ("merge.mean_kl + bytes.adapter + harness.adapter.hellaswag.acc + contamination.num_seen <= forgetting", None),
    ],
)
def test_names_are_looked_at_before_anything_runs(condition: str, said: str | None) -> None:
    problems = condition_problems([condition], has_answers=False)
    assert (said is None) is (problems == [])
    assert said is None or said in problems[0]
    with pytest.raises(ConfigError, match=r"no metric is called adapter\.los;") as found:
        compose_config(["gate.conditions=['adapter.los <= 1']"])
    assert "did you mean adapter.loss?" in str(found.value)
