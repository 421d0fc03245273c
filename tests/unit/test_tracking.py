"""The parts of tracking that need no MLflow: records, names, addresses, system metrics."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import tracking, tracking_live, tracking_store
from pipeline.errors import DataError, TrackingError
from pipeline.files import hash_path, write_json, write_jsonl, write_text
from pipeline.schema import TrainMethod
from pipeline.tracking_push import MAX_PARAM_CHARACTERS, _cut, check_fingerprint
from pipeline.tracking_records import read_record
from pipeline.tracking_runs import RunRecord, describe_datasets, describe_training, format_value
from tests.records import FINGERPRINT, STEPS, make_record, settings, tracked


def test_importing_tracking_does_not_import_mlflow():
    code = "import sys, pipeline.tracking; sys.exit(any(name.startswith(('mlflow', 'torch')) for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "r8 a16 lr5e-3 all_linear seed0 qlora · 3f2a91"),
        ({"lora__r": 4, "lora__lora_alpha": 6.0}, "r4 a6 lr5e-3 all_linear seed0 qlora · 3f2a91"),
        ({"train__learning_rate": 2.5e-4}, "r8 a16 lr2.5e-4 all_linear seed0 qlora · 3f2a91"),
        ({"lora__target_modules": ["q_proj", "v_proj"]}, "r8 a16 lr5e-3 q_proj,v_proj seed0 qlora · 3f2a91"),
        ({"lora__use_dora": True}, "r8 a16 lr5e-3 all_linear dora seed0 qlora · 3f2a91"),
        ({"train__seed": 3}, "r8 a16 lr5e-3 all_linear seed3 qlora · 3f2a91"),
        ({"train__method": TrainMethod.full, "train__learning_rate": 1e-5}, "lr1e-5 seed0 full · 3f2a91"),
    ],
)
def test_run_name_says_what_was_tried(changes, name):
    usual = {"lora__r": 8, "lora__lora_alpha": 16.0, "lora__target_modules": "all_linear", "train__learning_rate": 5e-3}
    assert describe_training(settings(**(usual | changes)), FINGERPRINT, {}).run_name == name


def test_params_are_what_makes_the_adapter_and_nothing_else():
    params = describe_training(settings(lora__r=4), FINGERPRINT, {}).params
    assert params["lora.r"] == 4
    assert params["data.files.train"] == settings().data.files.train
    assert {key.split(".")[0] for key in params} == {"data", "model", "quantization", "lora", "train"}


def test_what_users_name_themselves_is_a_value_and_no_name():
    """MLflow refuses a name with a backslash, and with it the whole run."""
    pattern = {r"layers\.0\..*": 4}
    params = describe_training(settings(lora__rank_pattern=pattern), FINGERPRINT, {}).params
    assert params["lora.rank_pattern"] == pattern
    assert all(re.fullmatch(r"[\w./ :-]+", key) for key in params)


def test_run_file_comes_back_as_it_was(tmp_path):
    run = describe_training(settings(), FINGERPRINT, {"data": "1"})
    tracking.write_run(run, "run-id", tmp_path / "run.json")
    loaded = RunRecord.load(tmp_path / "run.json")
    assert loaded.run_id == "run-id"
    assert (loaded.params, loaded.tags, loaded.run_name) == (run.params, run.tags, run.run_name)
    write_json(tmp_path / "run.json", {"fingerprint": "x"})
    with pytest.raises(DataError, match="not a run record"):
        RunRecord.load(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), (16.0, "16"), (0.005, "0.005"), (5e-5, "5e-05"), (["q"], '["q"]'), ("nf4", "nf4")],
)
def test_format_value(value, text):
    assert format_value(value) == text


def test_long_values_keep_their_difference():
    a, b = "x" * 9000 + "a", "x" * 9000 + "b"
    assert len(_cut(a, MAX_PARAM_CHARACTERS)) == MAX_PARAM_CHARACTERS
    assert _cut(a, MAX_PARAM_CHARACTERS) != _cut(b, MAX_PARAM_CHARACTERS)
    assert _cut("short", MAX_PARAM_CHARACTERS) == "short"


def test_record_holds_all_stages(tmp_path):
    record = read_record(make_record(tmp_path))
    assert record.values["evaluate.adapter.loss"] == 1.0
    assert record.values["evaluate.forgetting"] == 0.1
    assert record.values["merge.merged.loss"] == 1.0
    assert record.values["gate.passed"] == 1.0
    assert record.values["train.flat_loss"] == 0.0
    assert "evaluate.base.bleu" not in record.values
    assert record.tags["evaluate.max_rows"] == "50"
    assert record.tags["merge.merge_base"] == "dequantized"
    assert [p.step for p in record.points if p.key == "train.loss"] == list(STEPS)
    assert record.texts["samples/predictions_first_100.jsonl"].count("\n") == 100
    assert "lora:" in record.texts["config/params.yaml"]
    assert record.left_out == []
    assert record.ended_at is not None


def test_yesterdays_evaluation_stays_off_todays_row(tmp_path):
    """Retrained, not yet evaluated: the files in `metrics/` are another adapter's."""
    make_record(tmp_path)
    write_text(tmp_path / "models/adapter/adapter_model.safetensors", "other weights")
    record = read_record(tmp_path)
    assert not [key for key in record.values if key.startswith(("evaluate", "merge", "gate"))]
    assert [line.split(":")[0] for line in record.left_out] == ["evaluate", "merge", "gate"]


def make_harness(folder: Path) -> None:
    write_json(folder / "metrics/harness.json", {"adapter": {"hellaswag": {"acc": 0.25}}})
    write_json(folder / "reports/harness/results.json", {"limit": None})
    write_text(folder / "reports/harness/tasks/test.jsonl", "the test split")
    made = {"settings": {"evaluate": {"max_rows": 7}}, "adapter_sha256": hash_path(folder / "models/adapter")}
    write_json(folder / "reports/harness/provenance.json", made)


def test_the_harness_is_a_stage_of_the_record(tmp_path):
    make_harness(make_record(tmp_path))
    record = read_record(tmp_path)
    assert record.values["harness.adapter.hellaswag.acc"] == 0.25
    artifacts = {name for name in record.artifacts if "harness" in name}
    assert artifacts == {"metrics/harness.json", "reports/harness/results.json"}
    assert record.tags["evaluate.max_rows"] == "50"  # evaluate's own
    assert record.left_out == []


def test_a_harness_of_another_adapter_is_left_out_alone(tmp_path):
    make_harness(make_record(tmp_path))
    write_json(tmp_path / "reports/harness/provenance.json", {"adapter_sha256": "0"})
    record = read_record(tmp_path)
    assert not [key for key in record.values if key.startswith("harness")]
    assert record.values["gate.passed"] == 1.0
    assert record.left_out == ["harness: its files are of another adapter (run `python -m pipeline.harness`)"]


def test_gate_of_other_metrics_is_left_out(tmp_path):
    make_record(tmp_path)
    write_json(tmp_path / "metrics/evaluate.json", {"adapter": {"loss": 0.9}})
    record = read_record(tmp_path)
    assert "gate.passed" not in record.values
    assert record.values["evaluate.adapter.loss"] == 0.9


def test_a_final_number_does_not_hide_behind_a_curve_of_its_name(tmp_path):
    make_record(tmp_path)
    write_json(tmp_path / "metrics/train.json", {"loss": 0.7})
    record = read_record(tmp_path)
    assert record.values["train.final.loss"] == 0.7
    assert "train.loss" not in record.values


def test_broken_history_is_named(tmp_path):
    make_record(tmp_path)
    write_text(tmp_path / "reports/train/history.jsonl", '{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(DataError, match=r"history\.jsonl:2"):
        read_record(tmp_path)


def test_system_metrics_of_the_record_keep_their_times(tmp_path):
    make_record(tmp_path)
    write_jsonl(tmp_path / "reports/train/system.jsonl", [{"step": 5, "timestamp": 123, "system/cpu": 40.0}])
    (point,) = [p for p in read_record(tmp_path).points if p.key == "system/cpu"]
    assert (point.step, point.timestamp, point.value) == (5, 123, 40.0)


def test_describe_datasets_counts_and_names_the_splits(tmp_path, make_split):
    make_split([(2, 2), (3, 1)], name="train")
    make_split([(2, 2)], name="general")
    train, general = describe_datasets(settings(), tmp_path)
    assert (train["context"], train["num_rows"]) == ("training", 2)
    assert general["context"] == "forgetting"
    assert len(train["digest"]) <= 36
    assert train["digest"] != general["digest"]


def test_store_is_the_parent_projects_inside_an_experiment(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "parent"))
    monkeypatch.chdir(tmp_path)
    assert tracking_store.store_uri() == f"sqlite:///{tmp_path}/parent/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///own.db")
    assert tracking_store.store_uri() == f"sqlite:///{tmp_path}/parent/own.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    assert tracking_store.store_uri() == "http://somewhere:5000"


def test_passwords_stay_out_of_messages():
    assert tracking_store.redact("https://me:secret@host:8/x") == "https://host:8/x"
    assert tracking_store.redact("sqlite:////a/b.db") == "sqlite:////a/b.db"
    uri = "http://me:secret@host:8"
    text = f"API request to {uri}/api failed after 500 answers for user me with secret " + "x" * 400
    message = str(tracking_store.unusable(uri, RuntimeError(text)))
    assert "secret" not in message
    assert "API request to http://host:8/api failed" in message
    assert message.endswith("x ...")
    assert "secret" in str(tracking_store.unusable("http://host:8", RuntimeError("no secret")))


def test_fingerprint_is_checked_before_it_stands_in_a_query():
    check_fingerprint(FINGERPRINT)
    with pytest.raises(TrackingError, match="not hex"):
        check_fingerprint("x' OR 'a' = 'a")


def test_sampling_names_are_those_of_mlflows_page():
    values = tracking_live.sample_system()
    assert values["system/process_memory_megabytes"] > 1
    assert 0 < values["system/system_memory_usage_percentage"] <= 100
    assert all(key.startswith("system/") for key in values)


def test_gpus_are_asked_for_by_identity(monkeypatch, tmp_path):
    asked = tmp_path / "asked"
    write_text(tmp_path / "nvidia-smi", f'#!/bin/sh\necho "$@" > {asked}\necho "37, 1000, 250.5"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(tracking_live, "visible_gpus", lambda: ["GPU-abc"])
    values = tracking_live.sample_system()
    assert values["system/gpu_0_utilization_percentage"] == 37.0
    assert values["system/gpu_0_memory_usage_megabytes"] == pytest.approx(1048.576)
    assert asked.read_text().strip().endswith("-i GPU-abc")


def test_the_fuse_makes_everything_do_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    runtime = tracked(tracking=False)
    folder = make_record(tmp_path / "work")
    live = tracking.open_run(RunRecord.load(folder / "models/run.json"), runtime)
    live.log(1, {"train.loss": 1.0})
    assert live.close(system_file=tmp_path / "system.jsonl") is None
    assert tracking.record_stage("train", runtime, folder) is None
    assert not (tmp_path / "root").exists()
    assert not (tmp_path / "system.jsonl").exists()


def test_a_stage_without_a_run_warns_and_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking.record_stage("evaluate", tracked(inputs_dir="."), tmp_path) is None
    assert "is not in MLflow" in caplog.text


def test_unsent_record_waits_in_the_parents_outbox(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    monkeypatch.setattr(tracking, "_import_mlflow", lambda: (_ for _ in ()).throw(TrackingError("no answer.")))
    folder = make_record(tmp_path / "work")
    make_harness(folder)
    for stage in ("train", "merge", "harness"):
        tracking.record_stage(stage, tracked(inputs_dir=str(folder)), folder)
    assert len(caplog.records) == 3
    assert "python -m pipeline.tracking sync" in caplog.text
    waiting = tmp_path / "root/.training/outbox" / FINGERPRINT
    assert read_record(waiting / "train", ["train"]).points == read_record(folder, ["train"]).points
    kept = sorted(p.relative_to(waiting).as_posix() for p in (waiting / "merge").rglob("*") if p.is_file())
    assert kept == ["merge/metrics/merge.json", "merge/models/merged/provenance.json", "merge/models/run.json"]
    kept = sorted(p.relative_to(waiting).as_posix() for p in (waiting / "harness").rglob("*") if p.is_file())
    assert kept == [
        f"harness/{name}" for name in ("metrics/harness.json", "models/run.json", "reports/harness/provenance.json",
                                       "reports/harness/results.json")
    ]  # fmt: skip


def test_full_disk_is_said_not_raised(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    monkeypatch.setattr(tracking, "_import_mlflow", lambda: (_ for _ in ()).throw(TrackingError("no answer.")))

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking, "_copy", full)
    tracking.record_stage("train", tracked(), make_record(tmp_path / "work"))
    assert "No space left" in caplog.text
    assert not list((tmp_path / "root/.training/outbox").rglob("*.json"))
