"""The table at the end of `make repro`."""

import pytest

from pipeline.errors import DataError
from pipeline.files import write_json
from pipeline.labels import MODELS
from pipeline.summary import main, summary

SCORES = {"loss": 2.0, "perplexity": 7.389, "num_tokens": 1234, "exact_match": 0.25, "rouge_l": 0.5, "bleu": 12.34}
GENERAL = {"general_loss": 3.0, "general_num_tokens": 10}


def write_metrics(folder, keys=frozenset(SCORES)):
    scores = {key: value for key, value in SCORES.items() if key in keys} | GENERAL
    models = dict.fromkeys(("base", "quantized", "adapter"), scores)
    write_json(folder / "metrics/evaluate.json", {**models, "forgetting": 0.125})
    write_json(folder / "metrics/merge.json", {"merged": {**scores, "loss": 1.5}, "mean_kl": 1e-9})


def test_a_line_a_model_and_where_to_look_next(tmp_path):
    write_metrics(tmp_path)
    text = summary(tmp_path)
    lines = text.splitlines()
    assert [line[:36].strip() for line in lines[1:5]] == list(MODELS.values())[:4]
    assert lines[1].split() == ["base", "2.0000", "7.389", "0.250", "0.500", "12.3", "3.0000"]
    assert "1.5000" in lines[4]
    assert "1,234 supervised tokens" in text
    assert "+0.1250 nats" in text
    assert "make ui" in text
    assert "gate:" not in text
    write_json(
        tmp_path / "metrics/gate.json", {"passed": False, "num_conditions": 3, "num_failed": 1, "num_inconclusive": 0}
    )
    assert "gate: NOT passed, 2 of 3 conditions met" in summary(tmp_path)


def test_without_answers_the_task_columns_are_left_out(tmp_path):
    write_metrics(tmp_path, {"loss", "perplexity", "num_tokens"})
    assert "BLEU" not in summary(tmp_path)
    assert "perplexity" in summary(tmp_path)


def test_missing_metrics_are_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(DataError, match=r"metrics/evaluate\.json: no such file"):
        summary(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert "dvc repro" in capsys.readouterr().err
