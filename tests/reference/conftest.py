"""An MLflow store of the test's own, and a real server."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline import tracking_store


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """An initialised sqlite store; making one takes MLflow 8 s, so the tests copy this one."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracking_store.set_environment()
    tracking_store._make_sqlite(path)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch, empty_database) -> Path:
    """A project folder whose default store is ready; the working folder."""
    root = tmp_path / "project"
    root.mkdir()
    shutil.copy(empty_database, root / "mlflow.db")
    monkeypatch.setenv("DVC_ROOT", str(root))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    return root


class Server:
    """`mlflow server` on a free port of 127.0.0.1, in a process group of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 150) -> None:
        """Returns when it answers; does nothing when it runs already."""
        if self.process is not None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", (self.folder / "artifacts").as_uri()]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        self.kill()
        raise AssertionError(f"mlflow server did not start:\n{(self.folder / 'server.log').read_text()[-3000:]}")

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
                self.signal(signal.SIGKILL)
            self.process.wait(timeout=20)
            self.process = None


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory, empty_database):
    """Started by the first test that needs it (10 s and more); killed at the end, whatever happens."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "mlflow.db")
    made = Server(folder)
    yield made
    made.kill()


@pytest.fixture
def server(shared_server, project, monkeypatch, request):
    """A running server, named in MLFLOW_TRACKING_URI, with an experiment of the test's own."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared_server.uri)
    shared_server.start()
    return shared_server
