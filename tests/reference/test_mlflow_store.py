"""Tracking against a real sqlite store of MLflow."""

import contextlib
import dataclasses
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient

from pipeline import tracking, tracking_push
from pipeline.errors import TrackingError
from pipeline.files import hash_path, write_json, write_jsonl, write_text
from pipeline.tracking_runs import RunRecord
from pipeline.tracking_store import open_store, store_uri
from tests.records import FINGERPRINT, STEPS, make_measurements, make_record, tracked

OTHER = "77" * 32
ROOT = Path(__file__).resolve().parents[2]


def only_run(root: Path, client: MlflowClient | None = None):
    client = client or MlflowClient(store_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == root.name]
    (run,) = client.search_runs([experiment.experiment_id])
    return client.get_run(run.info.run_id)


def history(run, key: str, client: MlflowClient | None = None) -> list[tuple[int, float]]:
    points = (client or MlflowClient(store_uri())).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def rows(root: Path) -> dict[str, int]:
    """Number of rows of every table of the store."""
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: database.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables}


def files(root: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in (root / "mlartifacts").rglob("*") if p.is_file()}


def test_one_adapter_is_one_row_with_everything(project, monkeypatch):
    """Four stages, four pushes, one run: settings, curves, scores, parity and the gate side by side."""
    monkeypatch.setenv("DVC_EXP_NAME", "sweep-1")
    make_record(project)
    for stage in ("train", "evaluate", "merge", "gate"):
        tracking.record_stage(stage, tracked(), project)
    run = only_run(project)
    assert run.info.run_name == RunRecord.load(project / "models/run.json").run_name
    assert run.info.status == "FINISHED"
    assert run.data.params["lora.r"] == "8"
    assert run.data.params["model.hub_id"] == "null"
    assert run.data.metrics["train.validation_loss"] == 1.0
    assert run.data.metrics["evaluate.adapter.exact_match"] == 0.5
    assert run.data.metrics["evaluate.forgetting"] == 0.1
    assert run.data.metrics["merge.merged.loss"] == 1.0
    assert run.data.metrics["gate.passed"] == 1.0
    assert run.data.tags["evaluate.max_rows"] == "50"
    assert run.data.tags["merge.dtype"] == "float32"
    assert run.data.tags["fingerprint.base"] == "2"
    assert run.data.tags["dvc_experiment"] == "sweep-1"
    assert history(run, "train.loss") == [(step, 1.0 + 1 / step) for step in STEPS]
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.tags[0].value) == ("contracts-train", "training")


def test_the_adapter_is_the_runs_model_and_can_be_downloaded(project, tmp_path):
    make_record(project)
    run_id = tracking.record_stage("train", tracked(), project)
    client = MlflowClient(store_uri())
    (output,) = client.get_run(run_id).outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, model.model_type, str(model.status)) == ("adapter", "LoRA adapter", "READY")
    copied = client.download_artifacts(run_id, "adapter", str(tmp_path))
    assert hash_path(Path(copied)) == hash_path(project / "models/adapter")


def test_artifacts_are_settings_plots_tables_and_samples(project):
    make_record(project)
    tracking.sync()
    run, client = only_run(project), MlflowClient(store_uri())
    folders = ("config", "reports/train", "samples", "metrics")
    found = {file.path for folder in folders for file in client.list_artifacts(run.info.run_id, folder)}
    assert {"config/params.yaml", "reports/train/curves.csv", "samples/predictions_first_100.jsonl"} <= found
    assert "metrics/merge.json" in found


def test_sync_fills_an_empty_store_and_a_second_one_changes_nothing(project):
    make_record(project)
    (line,) = tracking.sync()
    assert "new run" in line
    run = only_run(project)
    assert run.info.start_time < run.info.end_time
    assert run.data.metrics["gate.passed"] == 1.0
    assert history(run, "train.loss") == [(step, 1.0 + 1 / step) for step in STEPS]
    before, stored = rows(project), files(project)
    (line,) = tracking.sync()
    assert line.endswith("up to date")
    assert rows(project) == before
    assert files(project) == stored


def test_sync_completes_what_is_missing_and_mends_what_was_damaged(project):
    make_record(project)
    tracking.sync()
    run = only_run(project)
    model = run.outputs.model_outputs[0].model_id
    damaged = project / f"mlartifacts/models/{model}/artifacts/adapter_model.safetensors"
    damaged.unlink()
    next((project / "mlartifacts").rglob("curves.csv")).write_text("cut")
    events = [{"step": step, "train.loss": 1 + 1 / step} for step in (*STEPS, 5)]
    write_jsonl(project / "reports/train/history.jsonl", events)
    (line,) = tracking.sync()
    assert "1 points" in line
    assert damaged.exists()
    assert [step for step, _ in history(run, "train.loss")] == [*STEPS, 5]


def test_a_new_measurement_of_the_same_adapter_becomes_the_latest(project):
    make_record(project)
    tracking.sync()
    make_measurements(project, loss=0.8)
    tracking.sync()
    assert only_run(project).data.metrics["evaluate.adapter.loss"] == 0.8
    assert [value for _, value in history(only_run(project), "evaluate.adapter.loss")] == [0.8, 1.0]
    assert len(history(only_run(project), "evaluate.base.loss")) == 1


def test_a_param_that_changed_is_kept_as_first_logged(project):
    """Params cannot change in MLflow; the same fingerprint reached from elsewhere must not fail."""
    make_record(project)
    tracking.sync()
    run = RunRecord.load(project / "models/run.json")
    dataclasses.replace(run, params=run.params | {"data.path": "elsewhere", "new": 1}).save(project / "models/run.json")
    tracking.sync()
    found = only_run(project)
    assert found.data.params["data.path"] == run.params["data.path"]
    assert found.data.params["new"] == "1"
    assert found.data.tags["also.data.path"] == "elsewhere"


def test_long_and_many_params_fit_mlflows_limits(project):
    make_record(project)
    run = RunRecord.load(project / "models/run.json")
    many = {f"data.extra_{n}": n for n in range(230)} | {"data.system_prompt": "x" * 9000}
    dataclasses.replace(run, params=run.params | many).save(project / "models/run.json")
    tracking.sync()
    found = only_run(project).data.params
    assert len(found) == len(run.params | many)
    assert len(found["data.system_prompt"]) == tracking_push.MAX_PARAM_CHARACTERS


def test_two_adapters_are_two_rows_and_two_experiments_share_one(project, tmp_path, monkeypatch):
    for name, fingerprint in (("a", FINGERPRINT), ("b", OTHER), ("c", OTHER)):
        monkeypatch.setenv("DVC_EXP_NAME", name)
        tracking.record_stage("train", tracked(), make_record(tmp_path / name, fingerprint))
    client = MlflowClient(store_uri())
    found = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    assert {run.data.tags["dvc_experiment"] for run in found} == {"a", "b, c"}


def test_a_run_deleted_in_mlflow_is_not_made_again(project):
    make_record(project)
    tracking.sync()
    client = MlflowClient(store_uri())
    client.delete_run(only_run(project).info.run_id)
    (line,) = tracking.sync()
    assert "deleted in MLflow" in line
    assert not client.search_runs([open_store().experiment_id], run_view_type=ViewType.ACTIVE_ONLY)


def test_an_adapter_too_large_to_upload_says_so(project, monkeypatch):
    monkeypatch.setattr(tracking_push, "MAX_UPLOAD_BYTES", 10)
    make_record(project)
    tracking.sync()
    model_id = only_run(project).outputs.model_outputs[0].model_id
    client = MlflowClient(store_uri())
    assert "not uploaded" in client.get_logged_model(model_id).tags["files"]
    assert client.list_logged_model_artifacts(model_id) == []


def test_live_points_are_completed_by_the_record_and_not_doubled(project):
    """A training that logs live, is killed, resumes from a checkpoint, and ends."""
    make_record(project)
    run = RunRecord.load(project / "models/run.json")
    live = tracking.open_run(run, tracked())
    for step in STEPS[:2]:
        live.log(step, {"train.loss": 1.0 + 1 / step})
    first = live.close("KILLED")
    assert only_run(project).info.status == "KILLED"
    assert len(history(only_run(project), "train.loss")) == 2
    live = tracking.open_run(run, tracked())
    live.log(STEPS[1], {"train.loss": 1.0 + 1 / STEPS[1]})  # the step after the checkpoint comes again
    live.log(STEPS[2], {"train.loss": 1.0 + 1 / STEPS[2]})
    assert live.close() == first
    assert only_run(project).info.status == "RUNNING"
    tracking.record_stage("train", tracked(), project)
    assert history(only_run(project), "train.loss") == [(step, 1.0 + 1 / step) for step in STEPS]
    assert only_run(project).info.status == "FINISHED"


def test_an_exception_in_training_marks_the_run_failed(project):
    make_record(project)
    with pytest.raises(ZeroDivisionError), tracking.open_run(RunRecord.load(project / "models/run.json"), tracked()):
        raise ZeroDivisionError
    assert only_run(project).info.status == "FAILED"


def test_system_metrics_are_logged_and_kept_in_the_record(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.5")
    make_record(project)
    live = tracking.open_run(RunRecord.load(project / "models/run.json"), tracked(system_metrics=True))
    live.log(1, {"train.loss": 2.0})
    time.sleep(2.5)
    live.close(system_file=project / "reports/train/system.jsonl")
    points = history(only_run(project), "system/cpu_utilization_percentage")
    assert len(points) >= 2
    tracking.sync()
    assert history(only_run(project), "system/cpu_utilization_percentage") == points


def test_log_never_waits(project):
    make_record(project)
    live = tracking.open_run(RunRecord.load(project / "models/run.json"), tracked())
    start = time.perf_counter()
    for step in range(1000):
        live.log(step, {"train.loss": 1.0})
    assert time.perf_counter() - start < 0.1
    live.close()
    assert len(history(only_run(project), "train.loss")) == 1000


def test_a_moved_project_takes_its_artifacts_along(project, tmp_path, monkeypatch):
    make_record(project)
    tracking.sync()
    moved = tmp_path / "elsewhere" / "project"
    moved.parent.mkdir()
    shutil.move(project, moved)
    monkeypatch.setenv("DVC_ROOT", str(moved))
    monkeypatch.chdir(moved)
    command = [sys.executable, "-m", "pipeline.tracking", "sync"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=moved, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "up to date" in done.stdout, done.stdout + done.stderr
    run = only_run(moved)
    assert run.info.artifact_uri.startswith(moved.as_uri())
    assert MlflowClient(store_uri()).list_artifacts(run.info.run_id, "config")
    assert not project.exists()


def test_a_deleted_experiment_is_named(project):
    store = open_store()
    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(TrackingError, match=r"restore -x"):
        tracking.sync()


def test_an_unreadable_record_does_not_hold_up_the_others(project):
    waiting = project / ".training/outbox" / OTHER / "train"
    write_json(waiting / "models/run.json", {"broken": True})
    write_json(waiting / "metrics/train.json", {})
    make_record(project)
    left, line = tracking.sync()
    assert "left in the outbox" in left
    assert "new run" in line


def test_a_half_made_database_is_never_opened(tmp_path, monkeypatch):
    """Killed while the store was being made: the next process makes it anew."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_text(tmp_path / ".mlflow.db.unfinished", "half of a database")
    open_store()
    assert [p.name for p in tmp_path.glob("*mlflow.db*")] == ["mlflow.db"]


WORKER = """
import sys
from pathlib import Path
from pipeline import tracking
from pipeline.tracking_runs import RunRecord
from tests.records import make_record, tracked
number = int(sys.argv[1])
folder = make_record(Path(sys.argv[2]) / str(number), fingerprint=f"{number:064x}", loss=float(number))
live = tracking.open_run(RunRecord.load(folder / "models/run.json"), tracked())
live.log(1, {"train.loss": 1.0 + number})
live.close()
for stage in ("train", "evaluate", "merge", "gate"):
    assert tracking.record_stage(stage, tracked(inputs_dir=str(folder)), folder), stage
"""


@pytest.mark.parametrize("num_processes", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_at_once_on_a_fresh_store_lose_nothing(num_processes, tmp_path, monkeypatch):
    """Six processes that opened a fresh sqlite store at once used to crash (HAZARDS)."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*command, str(number), str(tmp_path / "work")], stderr=subprocess.PIPE, text=True, cwd=ROOT)
        for number in range(num_processes)
    ]
    try:
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * num_processes, "\n".join(errors)
    assert not list((root / ".training/outbox").glob("[!.]*")), "\n".join(errors)
    client = MlflowClient(store_uri())
    found = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    assert len(found) == num_processes
    for run in found:
        number = int(run.data.tags["fingerprint"], 16)
        assert run.data.metrics["evaluate.adapter.loss"] == number
        assert run.data.metrics["gate.passed"] == 1.0
        assert history(run, "train.loss") == [(step, number + 1 / step) for step in STEPS]
