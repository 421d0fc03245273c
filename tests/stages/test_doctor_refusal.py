"""The doctor's command and the stages' refusal, as processes, on what is really broken."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.unit.test_doctor import fake_package, small_disk

__all__ = ["small_disk"]  # a fixture


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_"))} | environment
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


def test_a_stage_refuses_on_a_wrong_version(tmp_path) -> None:
    fake = fake_package(tmp_path / "fake", "scipy", "1.0.0")
    refused = run("stages.gate", f"runtime.output_dir={tmp_path}/out", PYTHONPATH=str(fake))
    assert refused.returncode == 1
    assert refused.stderr.startswith("gate: error: cannot start here:\n  scipy 1.0.0 in")
    assert "Traceback" not in refused.stderr


def test_a_stage_refuses_on_a_full_disk(small_disk) -> None:
    refused = run("stages.gate", "--config-name=locked", f"runtime.output_dir={small_disk}/out")  # as DVC runs it
    assert refused.returncode == 1
    assert f"{small_disk}: 0.0 GB free, 0.2 GB are needed" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_doctor_works_where_hydra_does_not(tmp_path) -> None:
    (tmp_path / "hydra.py").write_text("raise ImportError('cannot import name OmegaConf')\n")
    done = run("pipeline.doctor", "--json", "--only", "packages", "--only", "hydra", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    found = {finding["name"]: finding["status"] for finding in json.loads(done.stdout)["findings"]}
    assert found == {"python": "ok", "settings": "fail", "packages": "ok", "hydra": "fail"}


def test_a_dead_server_is_told_in_seconds_and_its_password_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://me:pass-word@127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        done = run("pipeline.doctor", "--only", "mlflow", "runtime.tracking=true", MLFLOW_TRACKING_URI=uri)
        assert time.monotonic() - started < 20  # 3 s of them for the server
    assert done.returncode == 1
    assert "no answer from http://127.0.0.1:" in done.stdout
    assert "pass-word" not in done.stdout + done.stderr


@pytest.mark.slow
def test_every_check_on_this_machine_and_on_a_broken_one(tmp_path, small_disk) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    whole = json.loads(run("pipeline.doctor", "--json", "runtime.tracking=true", MLFLOW_TRACKING_URI=store).stdout)
    failed = [finding for finding in whole["findings"] if finding["status"] == "fail"]
    assert failed == []
    fake = fake_package(tmp_path / "fake", "transformers", "4.40.0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = run(
            "pipeline.doctor", "--json", f"runtime.output_dir={small_disk}/out",
            PYTHONPATH=str(fake), MLFLOW_TRACKING_URI=uri, TMPDIR=str(small_disk),
        )  # fmt: skip
    assert done.returncode == 1
    broken = json.loads(done.stdout)
    names = {finding["name"] for finding in broken["findings"] if finding["status"] == "fail"}
    assert names == {"packages", "copies", "disk", "room", "mlflow"}
    assert {finding["name"] for finding in broken["findings"]} == {finding["name"] for finding in whole["findings"]}
