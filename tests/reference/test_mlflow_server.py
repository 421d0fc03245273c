"""Tracking against a real `mlflow server`: there, down, killed half-way, and one that never answers."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from pipeline import tracking, tracking_live
from pipeline.errors import TrackingError
from pipeline.files import hash_path
from pipeline.tracking_runs import RunRecord
from tests.records import FINGERPRINT, STEPS, make_record, tracked

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("train", "evaluate", "merge", "gate")
A_FEW_SECONDS = 12  # MLflow's own: four minutes


@pytest.fixture(autouse=True)
def forget_warnings():
    tracking_live._warned.clear()


def run_sync(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.tracking", "sync"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def check_everything_once(uri: str, folder: Path, tmp_path: Path) -> None:
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"]).experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["lora.r"] == "8"
    assert run.data.metrics["gate.passed"] == 1.0
    for key in ("evaluate.adapter.loss", "merge.mean_kl", "train.validation_loss"):
        assert len(client.get_metric_history(run.info.run_id, key)) == 1
    points = client.get_metric_history(run.info.run_id, "train.loss")
    assert sorted((point.step, point.value) for point in points) == [(step, 1 + 1 / step) for step in STEPS]
    assert len(client.get_run(run.info.run_id).inputs.dataset_inputs) == 1
    copied = client.download_artifacts(run.info.run_id, "adapter", str(tmp_path))
    assert hash_path(Path(copied)) == hash_path(folder / "models/adapter")


def test_server_gets_everything_live_and_by_record(project, server, tmp_path, monkeypatch):
    make_record(project)
    with tracking.open_run(RunRecord.load(project / "models/run.json"), tracked()) as live:
        live.log(1, {"train.loss": 2.0})
        run_id = live.close()
    assert [tracking.record_stage(stage, tracked(), project) for stage in STAGES] == [run_id] * 4
    check_everything_once(server.uri, project, tmp_path)
    (line,) = tracking.sync()
    assert line.endswith("up to date")
    assert not list((project / ".training/outbox").glob("[!.]*"))
    assert (project / "mlflow.db").exists()  # the default store was not touched:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert len(MlflowClient(f"sqlite:///{project}/mlflow.db").search_experiments()) == 1  # MLflow's own "Default"


def test_server_killed_while_training_loses_nothing(project, server, tmp_path, caplog):
    """Live logging stops with one warning, the records wait in the outbox, and sync sends them once."""
    work = make_record(tmp_path / "queued")  # a queued experiment's folder, deleted at its end
    live = tracking.open_run(RunRecord.load(work / "models/run.json"), tracked())
    live.log(1, {"train.loss": 2.0})
    deadline = time.monotonic() + 20
    while live.run_id is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.5)
    server.kill()
    start = time.monotonic()
    for step in STEPS[1:]:
        live.log(step, {"train.loss": 1 + 1 / step})
    time.sleep(1.5)
    live.close()
    for stage in STAGES:
        assert tracking.record_stage(stage, tracked(inputs_dir=str(work)), work) is None
    assert time.monotonic() - start < A_FEW_SECONDS * 2
    assert sum("Training goes on" in record.message for record in caplog.records) == 1
    assert sum("is kept in" in record.message for record in caplog.records) == 4
    copy = tmp_path / "copy"
    work.rename(copy)

    down = run_sync(project)
    assert down.returncode == 1
    assert server.uri in down.stderr
    assert "Traceback" not in down.stderr + down.stdout
    server.start()
    lines = tracking.sync()
    assert [line.split(": ")[-1] for line in lines] == ["train)", "evaluate)", "merge)", "gate)"]
    check_everything_once(server.uri, copy, tmp_path)
    assert not list((project / ".training/outbox").glob("[!.]*"))
    assert tracking.sync() == []


@pytest.mark.parametrize("answers", ["refuses", "accepts and never answers"])
def test_a_dead_server_costs_seconds_and_one_warning(project, monkeypatch, caplog, answers):
    make_record(project)
    run = RunRecord.load(project / "models/run.json")
    tracking._import_mlflow()
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        if answers != "refuses":
            deaf.listen(100)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{deaf.getsockname()[1]}")
        start = time.monotonic()
        live = tracking.open_run(run, tracked())
        live.log(1, {"train.loss": 2.0})
        assert time.monotonic() - start < 0.5
        assert live.close() is None
        assert tracking.record_stage("train", tracked(), project) is None
        assert time.monotonic() - start < A_FEW_SECONDS
        with pytest.raises(TrackingError, match="no answer from"):
            tracking.sync()
    assert len(caplog.records) == 2  # one of the live run, one of the stage
    assert "secret" not in caplog.text
    assert (project / ".training/outbox" / FINGERPRINT / "train/models/adapter").is_dir()


def test_a_server_that_freezes_half_way_costs_seconds(project, server, monkeypatch, caplog):
    """It answers the probe and then nothing: every request has a limit, and the first failure ends the push."""
    make_record(project)
    tracking._import_mlflow()
    from pipeline import tracking_push

    def freeze(*_):
        server.signal(signal.SIGSTOP)
        return original(*_)

    original = tracking_push.push
    monkeypatch.setattr(tracking_push, "push", freeze)
    start = time.monotonic()
    assert tracking.record_stage("train", tracked(), project) is None
    assert time.monotonic() - start < A_FEW_SECONDS * 1.5
    assert "is kept in" in caplog.text
    server.signal(signal.SIGCONT)
