"""A tracking server that dies under a training: no step waits for it, and in the end it holds everything once."""

import contextlib
import dataclasses
import http.server
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from pipeline import tracking, tracking_live
from pipeline.files import hash_file, hash_path, write_jsonl
from pipeline.tracking_live import LiveRun
from pipeline.tracking_records import read_record
from pipeline.tracking_runs import RunRecord, format_value
from tests.conftest import copy_project
from tests.records import make_record, tracked
from tests.reference.conftest import Server
from tests.stages.test_dvc import make_small

STEP_SECONDS = 0.05
LONGEST_STALL = 1.0
Event = dict[str, float]


@pytest.fixture(autouse=True)
def forget_warnings():
    tracking_live._warned.clear()


@contextlib.contextmanager
def hanging(port: int) -> Iterator[None]:
    """Somebody at the port who accepts and never answers."""
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        deaf.bind(("127.0.0.1", port))
        deaf.listen(100)
        yield


class Broken(http.server.BaseHTTPRequestHandler):
    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_error(500)

    do_GET = do_POST = do_PATCH = do_PUT = answer

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def answering_500(port: int) -> Iterator[None]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def wait_until_free(port: int) -> None:
    """The killed server's workers let go of the port a moment after their parent."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise AssertionError(f"port {port} is not free")


@contextlib.contextmanager
def away(kind: str, server: Server) -> Iterator[None]:
    """The server is away, in one way or another; back at the end."""
    if kind == "frozen":  # what reached it in the meantime may be answered, and done, when it thaws
        server.signal(signal.SIGSTOP)
        yield
        server.signal(signal.SIGCONT)
        return
    server.kill()
    wait_until_free(server.port)
    someone = {"hangs": hanging, "answers 500": answering_500}.get(kind)
    with someone(server.port) if someone else contextlib.nullcontext():
        yield
    server.start()


# The machine's own pauses: the same steps in a process that logs nothing.
METRONOME = f"""
import time
worst = 0.0
while True:
    started = time.perf_counter()
    time.sleep({STEP_SECONDS})
    if (late := time.perf_counter() - started - {STEP_SECONDS}) > worst:
        print(worst := late, flush=True)
"""


def train(live: LiveRun, outage: Callable[[], object], is_over: Callable[[], bool]) -> tuple[list[Event], float]:
    """Steps of 50 ms that log: some, then an outage beside them, and on until `is_over`.

    Returns:
        The events, and by how many seconds the slowest step was over its time, beyond what the machine paused.
    """
    metronome = subprocess.Popen([sys.executable, "-c", METRONOME], stdout=subprocess.PIPE, text=True)
    events: list[Event] = []
    stall, step, last, gone = 0.0, 0, None, None
    deadline = time.monotonic() + 120
    with ThreadPoolExecutor(1) as executor:
        while last is None or step < last:
            step += 1
            started = time.perf_counter()
            time.sleep(STEP_SECONDS)
            losses = [{"train.loss": 1 + 1 / step, "train.learning_rate": 1e-3 / step}]
            losses += [{"validation.loss": 2 + 1 / step}] if step % 10 == 0 else []
            for metrics in losses:
                live.log(step, metrics)
                events.append({"step": step, **metrics})
            stall = max(stall, time.perf_counter() - started - STEP_SECONDS)
            if gone is None and step >= 40 and live.run_id is not None:
                gone = executor.submit(outage)
            if last is None and gone is not None and gone.done():
                gone.result()
                last = step + 40 if is_over() else None
            assert time.monotonic() < deadline, "the outage did not end"
    metronome.kill()
    paused = max(map(float, metronome.communicate()[0].split()), default=0.0)
    print(f"{step} steps, longest stall {stall * 1000:.1f} ms, of the machine {paused * 1000:.1f} ms")
    return events, stall - paused


def make_trained(folder: Path) -> None:
    """The record of an adapter that is trained and not measured yet."""
    make_record(folder)
    for stage in ("evaluate", "merge", "gate"):
        (folder / f"metrics/{stage}.json").unlink()


def only_run(client: MlflowClient):
    (run,) = client.search_runs([client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"]).experiment_id])
    return run


def check_everything_once(uri: str, folder: Path, copies: Path) -> None:
    """The one run on the server holds all that the train stage left in `folder`, and nothing twice."""
    record, client = read_record(folder, ["train"], trusted=True), MlflowClient(uri)
    run = only_run(client)
    run_id = run.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {key: format_value(value) for key, value in record.run.params.items()}
    assert len(run.inputs.dataset_inputs) == len(record.run.datasets)
    expected: dict[str, dict[int, float]] = {key: {0: value} for key, value in record.values.items()}
    for point in record.points:
        expected.setdefault(point.key, {}).setdefault(point.step, point.value)
    assert run.data.metrics.keys() == expected.keys()
    for key, points in expected.items():
        stored = sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))
        assert stored == sorted(points.items()), key
    stored_files = Path(client.download_artifacts(run_id, "", str(copies)))
    for name, path in record.artifacts.items():
        assert hash_file(stored_files / name) == hash_file(path)
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert str(model.status) == "READY"
    adapter = client.download_artifacts(run_id, "adapter", str(copies))
    assert hash_path(Path(adapter)) == hash_path(folder / "models/adapter")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        ("killed", 2),
        pytest.param("killed", 20, marks=SLOW),
        pytest.param("hangs", 20, marks=SLOW),
        pytest.param("answers 500", 20, marks=SLOW),
        pytest.param("frozen", 20, marks=SLOW),
    ],
)
def test_a_server_away_for_a_while_stalls_no_step_and_gets_everything_once(
    project, server, tmp_path, monkeypatch, caplog, kind, seconds
):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    if seconds < 10:
        monkeypatch.setattr(tracking_live, "RETRY_SECONDS", 1.0)
    caplog.set_level(logging.INFO, "pipeline.tracking_live")
    make_trained(project)
    run = RunRecord.load(project / "models/run.json")
    run = dataclasses.replace(run, started_at=int(time.time() * 1000))
    run.save(project / "models/run.json")

    def outage() -> None:
        with away(kind, server):
            time.sleep(seconds)

    def is_back() -> bool:
        return "tracking is back" in caplog.text

    with tracking.open_run(run, tracked(system_metrics=True)) as live:
        events, stall = train(live, outage, is_back)
        run_id = live.close(system_file=project / "reports/train/system.jsonl")
    assert stall < LONGEST_STALL
    assert caplog.text.count("tracking is back") == 1
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    client = MlflowClient(server.uri)
    sent = [metric.step for metric in client.get_metric_history(run_id, "train.loss")]
    assert sent == sorted({event["step"] for event in events})  # live: the record is not sent yet

    write_jsonl(project / "reports/train/history.jsonl", events)
    assert tracking.record_stage("train", tracked(), project) == run_id
    check_everything_once(server.uri, project, tmp_path / "once")
    (line,) = tracking.sync()
    assert line.endswith("up to date")
    point = client.get_metric_history(run_id, "train.loss")[5]
    client.log_batch(run_id, metrics=[Metric("train.loss", point.value, point.timestamp + 1, point.step)])
    with pytest.raises(AssertionError, match=r"train\.loss"):  # a point twice would have been seen
        check_everything_once(server.uri, project, tmp_path / "twice")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["killed", "hangs", "answers 500", "frozen"])
def test_a_server_that_comes_back_after_the_training_gets_everything_once(project, server, tmp_path, caplog, kind):
    make_trained(project)
    run = RunRecord.load(project / "models/run.json")
    with contextlib.ExitStack() as outage:
        with tracking.open_run(run, tracked()) as live:
            events, stall = train(live, lambda: outage.enter_context(away(kind, server)), lambda: True)
            started = time.monotonic()
            live.close()
            assert time.monotonic() - started < tracking_live.CLOSE_SECONDS + 1
        assert stall < LONGEST_STALL
        write_jsonl(project / "reports/train/history.jsonl", events)
        assert tracking.record_stage("train", tracked(), project) is None
        assert sum("Training goes on" in record.message for record in caplog.records) == 1
    assert "from the outbox: train" in tracking.sync()[0]
    check_everything_once(server.uri, project, tmp_path / "copies")


@pytest.mark.slow
@pytest.mark.parametrize("call", ["create_run", "create_logged_model"])
def test_a_server_that_answers_too_late_makes_nothing_twice(project, server, tmp_path, monkeypatch, call):
    """Its database is locked for longer than a request may take: what was given up is done all the same."""
    locks: list[threading.Thread] = []

    def locked_call(client, *arguments, **named):
        if not locks:
            locks.append(threading.Thread(target=lock_database, args=(server.folder / "mlflow.db", 8.0)))
            locks[0].start()
            time.sleep(0.2)
        return original(client, *arguments, **named)

    original = getattr(MlflowClient, call)
    monkeypatch.setattr(MlflowClient, call, locked_call)
    make_trained(project)
    assert tracking.record_stage("train", tracked(), project) is None
    locks[0].join()
    time.sleep(1)
    assert "from the outbox: train" in tracking.sync()[0]
    check_everything_once(server.uri, project, tmp_path / "copies")


def lock_database(path: Path, seconds: float) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(seconds)


TRAIN = "python -m stages.train train.max_steps=80 train.eval_steps=20 runtime.tracking=true runtime.output_dir=outputs/dead"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_stage_outlives_its_server_and_sync_completes_the_run(server, tmp_path):
    copied = copy_project(tmp_path / "copied")
    make_small(copied)
    copied.run("dvc repro quantize")
    copied.env |= {name: os.environ[name] for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")}
    client, log = MlflowClient(server.uri), copied.folder / "train.log"
    with log.open("w") as output:
        stage = subprocess.Popen(
            f"exec {TRAIN}", shell=True, cwd=copied.folder, env=copied.env, stdout=output, stderr=output
        )
    try:
        num_live = wait_for_points(client, stage)
        server.kill()
        assert stage.wait(timeout=200) == 0, log.read_text()
    finally:
        stage.kill()
    assert log.read_text().count("Training goes on") == 1
    assert "is kept in" in log.read_text()
    assert "Traceback" not in log.read_text()
    server.start()
    left = len(client.get_metric_history(only_run(client).info.run_id, "train.loss"))
    assert num_live <= left < 80  # it did die in the middle
    assert "from the outbox: train" in copied.run("python -m pipeline.tracking sync")
    steps = sorted(metric.step for metric in client.get_metric_history(only_run(client).info.run_id, "train.loss"))
    assert steps == list(range(1, 81))
    check_everything_once(server.uri, copied.folder / "outputs/dead", tmp_path / "copies")
    assert not list((copied.folder / ".training/outbox").glob("[!.]*"))


def wait_for_points(client: MlflowClient, stage: subprocess.Popen) -> int:
    """The number of points of `train.loss` on the server, once there are some."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and stage.poll() is None:
        experiment = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
        for run in client.search_runs([experiment.experiment_id]) if experiment else []:
            if points := client.get_metric_history(run.info.run_id, "train.loss"):
                return len(points)
        time.sleep(0.2)
    raise AssertionError("no point came while the stage ran")
