"""The report and gate stages on made-up measurements: verdicts, files, and what they say."""

import json
from pathlib import Path

import numpy as np
import pytest

import stages.gate
import stages.report
from pipeline.config import compose_config
from pipeline.errors import ConfigError, GateError
from pipeline.files import hash_path, read_json, write_json, write_jsonl
from pipeline.plots import new_figure, save_figure
from pipeline.schema import Inconclusive
from pipeline.workspace import Workspace

HITS = {"base": 0.1, "quantized": 0.1, "adapter": 0.6, "merged": 0.6, "peft_4bit": 0.3}
HOSTILE = "<script>alert(1)</script> | `a` ```b```\nsecond line"


def make_results(folder: Path, num_rows: int = 60) -> Path:
    """What the stages before leave; the adapter answers 6 of 10 test rows, the base 1."""
    rng = np.random.default_rng(0)
    difficulty, order = rng.normal(0, 0.3, num_rows), rng.permutation(num_rows)
    test, general, answers = [], [], []
    for i in range(num_rows):
        sums = {}
        for model, share in HITS.items():
            hit = float(order[i] < share * num_rows)
            loss = 10 * (3 - 2 * share + difficulty[i])
            sums[model] = {"loss": [loss, 10], "exact_match": [hit, 1], "rouge_l": [hit, 1], "bleu": [hit * 4] * 10}
        test.append({"split": "test", "row_id": f"t:{i}", "cluster": f"t:{i}", "models": sums})
        losses = {model: {"general_loss": [20 + 2 * share, 10]} for model, share in HITS.items()}
        general.append({"split": "general", "row_id": f"g:{i}", "cluster": f"g:{i}", "models": losses})
        answer = {
            model: {"prediction": HOSTILE, "ended": True, "exact_match": False, "rouge_l": sums[model]["rouge_l"][0]}
            for model in ("base", "adapter")
        }
        answers.append({"row_id": f"t:{i}", "prompt": f"prompt {i} {HOSTILE}", "references": ["r"], **answer})
    for name, models in (("evaluate", ("base", "quantized", "adapter")), ("merge", ("merged", "peft_4bit"))):
        items = [{**item, "models": {m: item["models"][m] for m in models}} for item in test + general]
        write_jsonl(folder / f"reports/{name}/items.jsonl", items)
    write_jsonl(folder / "reports/evaluate/predictions.jsonl", answers)
    overlap = {"prompt": 0.5, "answer": 1.0, "train_row_id": "train:1", "is_exact": False, "seen": False}
    write_jsonl(folder / "reports/evaluate/contamination.jsonl", [{"row_id": "t:0", **overlap}])
    task = {"task": "local_test", "metric": "acc", "value": 0.4321, "stderr": 0.01, "low": 0.41, "high": 0.45}
    write_json(folder / "reports/evaluate/harness.json", {"limit": None, "results": [{"model": "adapter", **task}]})
    for picture in ("train/curves.png", "merge/survival.png"):
        save_figure(new_figure(1, 1), folder / "reports" / picture)
    scores = {name: {"loss": 1.0, "num_tokens": 600} for name in ("base", "quantized", "adapter")}
    counts = {"num_rows": num_rows, "num_seen": 0, "num_exact": 0}
    sizes = dict.fromkeys(("base", "quantized", "adapter"), 4_000_000)
    write_json(folder / "metrics/evaluate.json", {**scores, "forgetting": 0.1, "contamination": counts, "bytes": sizes})
    merge = {
        "mean_kl": 1e-9,
        "merge_base": "dequantized",
        "dtype": "float32",
        "parity_num_tokens": 5000,
        "top1_agreement": 1.0,
    }
    merge |= {"cast_loss_difference": 0.0, "survival_mean": 1.0, "survival_min": 0.999, "bytes": {"merged": 4_000_000}}
    write_json(folder / "metrics/merge.json", {**merge, "merged": {"loss": 1.0}})
    write_json(folder / "metrics/prepare.json", {"train": {"num_rows": 100, "num_supervised_tokens": 1000}})
    train = {"trainable_parameters": 10, "total_parameters": 1000, "num_steps": 5, "duration_seconds": 2.0}
    write_json(folder / "metrics/train.json", {**train, "fingerprint": "ab" * 32})
    return folder


def report(folder: Path, *conditions: str, **gate) -> dict:
    config = compose_config(["runtime.tracking=false"])
    config.gate.conditions = list(conditions)
    for name, value in gate.items():
        setattr(config.gate, name, value)
    stages.report.run(config, Workspace(folder, folder))
    stages.gate.run(config, Workspace(folder, folder))
    return read_json(folder / "metrics/gate.json")


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)


def test_a_gate_that_passes(tmp_path):
    make_results(tmp_path)
    verdict = report(tmp_path, "adapter.exact_match >= base.exact_match + 0.2", "merge.mean_kl < 1e-6")
    assert (verdict["passed"], verdict["num_conditions"], verdict["num_failed"]) == (True, 2, 0)
    assert report(tmp_path)["passed"]


def test_a_gate_that_fails_after_the_verdict_and_the_report_are_written(tmp_path):
    make_results(tmp_path)
    with pytest.raises(GateError, match=r"1 of 2 conditions failed, 0 inconclusive"):
        report(tmp_path, "adapter.loss >= base.loss", "forgetting <= 0.2")
    verdict = read_json(tmp_path / "metrics/gate.json")
    assert [condition["outcome"] for condition in verdict["conditions"]] == ["failed", "passed"]
    assert "NOT passed" in (tmp_path / "reports/evaluate/index.html").read_text()


@pytest.mark.parametrize(("does", "passes"), [("fail", False), ("warn", True), ("ignore", True)])
def test_what_the_test_set_cannot_decide(tmp_path, caplog, does, passes):
    """0.5 apart on 60 rows: the interval of the difference holds 0.45, the point alone would pass."""
    make_results(tmp_path)
    condition = "adapter.exact_match >= base.exact_match + 0.45"
    if passes:
        assert report(tmp_path, condition, inconclusive=Inconclusive(does))["num_inconclusive"] == 1
        assert any(record.levelname == "WARNING" for record in caplog.records) is (does == "warn")
    else:
        with pytest.raises(GateError, match="0 of 1 conditions failed, 1 inconclusive"):
            report(tmp_path, condition, inconclusive=Inconclusive(does))


def test_an_experiment_is_kept_with_its_verdict(tmp_path, monkeypatch, caplog):
    make_results(tmp_path)
    monkeypatch.setenv("DVC_EXP_NAME", "tried")
    assert not report(tmp_path, "adapter.loss >= base.loss")["passed"]
    assert "not passed; recorded" in caplog.text
    with pytest.raises(ConfigError, match=r"did you mean base\.loss"):  # a typo is no weak result
        report(tmp_path, "adapter.loss < bas.loss")


def test_the_report_says_it_all_and_trusts_no_text(tmp_path):
    make_results(tmp_path)
    report(tmp_path, "adapter.rouge_l >= base.rouge_l + 0.2")
    html = (tmp_path / "reports/evaluate/index.html").read_text()
    markdown = (tmp_path / "reports/evaluate/index.md").read_text()
    for text in (html, markdown):
        assert "peft" in text and "own merge into 4 bits" in text  # noqa: PT018
        assert all(
            word in text
            for word in ("better", "worse", "no difference shown", "fingerprint", "train:1", "local_test", "0.4321")
        )
    assert "<script>" not in html
    assert html.count("data:image/png;base64,") == 4
    assert not any(
        f"{quote}{scheme}" in html for quote in "\"'" for scheme in ("http", "//", "file:")
    )  # self-contained
    links = [part.split(")")[0] for part in markdown.split("](")[1:]]
    assert len(links) == 4
    assert all((tmp_path / "reports/evaluate" / link).is_file() for link in links)
    scores = json.loads((tmp_path / "reports/evaluate/scores.json").read_text())
    assert (
        scores["estimates"]["adapter"]["exact_match"]["low"]
        < 0.6
        < scores["estimates"]["adapter"]["exact_match"]["high"]
    )
    found = {(c["step"], c["metric"]): c["outcome"] for c in scores["comparisons"]}
    assert found["training", "exact_match"] == "better"
    assert found["quantisation", "exact_match"] == "no difference shown"
    assert found["peft's own merge into 4 bits", "loss"] == "worse"


def test_equal_measurements_give_an_equal_report(tmp_path):
    for name in ("a", "b"):
        report(make_results(tmp_path / name))
    assert hash_path(tmp_path / "a/reports/evaluate") == hash_path(tmp_path / "b/reports/evaluate")


def test_a_report_without_answers(tmp_path):
    make_results(tmp_path)
    (tmp_path / "reports/evaluate/predictions.jsonl").write_text("")
    report(tmp_path)
    assert "Best answers" not in (tmp_path / "reports/evaluate/index.html").read_text()
