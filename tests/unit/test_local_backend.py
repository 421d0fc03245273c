"""Workers on this machine: every job has its end, whatever becomes of its process."""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline import local_backend, point_worker
from pipeline.errors import ConfigError
from pipeline.gpu_leases import Gpu, Lease, LeaseError
from pipeline.jobs import Job, describe_exit
from pipeline.local_backend import LocalBackend

WORKER = """
import json, os, signal, sys, time
from pathlib import Path
for line in sys.stdin:
    job = json.loads(line)
    folder = Path(job["folders"][0])
    (folder / "done").write_text(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}")
    if folder.name.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if folder.name.startswith("exit"):
        sys.exit(3)
    if folder.name.startswith("slow"):
        signal.signal(signal.SIGTERM, lambda *_: ((folder / "checkpoint").write_text(""), sys.exit(130)))
        (folder / "ready").write_text("")
        time.sleep(60)
    print(json.dumps({"number": job["number"]}), flush=True)
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """jobs("ok", "kill", ...) -> a job each, whose stand-in for a worker does what its name says."""
    (tmp_path / "worker.py").write_text(WORKER)
    start = local_backend.subprocess.Popen

    def started(command, **options):
        return start([sys.executable, str(tmp_path / "worker.py")], **options)

    monkeypatch.setattr(local_backend.subprocess, "Popen", started)

    def make(*names: str) -> list[Job]:
        for name in names:
            (tmp_path / name).mkdir()
        return [Job(number, (tmp_path / name,)) for number, name in enumerate(names)]

    return make


def run(backend: LocalBackend, jobs: list[Job]) -> dict[str, str | None]:
    ends: dict[str, str | None] = {}
    try:
        backend.run(jobs, lambda job, problem: ends.__setitem__(job.name, problem))
    finally:
        backend.close()
    return ends


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_dies_takes_its_own_job_alone(jobs, num_workers: int) -> None:
    ends = run(LocalBackend(num_workers, on_cpu=True), jobs("ok1", "kill", "ok2", "exit", "ok3"))
    assert ends["ok1"] is ends["ok2"] is ends["ok3"] is None
    assert "killed by signal 9" in str(ends["kill"])
    assert ends["exit"] == "its process ended with exit status 3"


def test_one_process_does_many_jobs_with_its_threads(jobs, tmp_path: Path) -> None:
    run(LocalBackend(1, num_threads=3, on_cpu=True), jobs("a", "b", "c"))
    said = {(tmp_path / name / "done").read_text() for name in "abc"}
    assert len(said) == 1
    assert said.pop().split()[1] == "3"


def test_workers_that_were_expected_do_the_jobs(jobs, tmp_path: Path) -> None:
    backend = LocalBackend(2, on_cpu=True)
    backend.expect(1)
    backend.expect(2)  # a search asks for points bit by bit
    (early,) = [lane.worker for lane in backend._lanes]
    work = jobs("a", "b")
    assert set(run(backend, work).values()) == {None}
    assert early is not None
    assert str(early.pid) in {(tmp_path / name / "done").read_text().split()[0] for name in "ab"}


def test_a_worker_without_a_job_is_not_waited_for() -> None:
    backend = LocalBackend(1, on_cpu=True)
    backend.expect(1)
    (worker,) = [lane.worker for lane in backend._lanes]
    started = time.perf_counter()
    backend.close()
    assert worker is not None
    assert worker.returncode == -signal.SIGTERM
    assert time.perf_counter() - started < 3  # its imports take longer


def test_a_worker_whose_imports_fail_lives_to_say_so_in_its_job(monkeypatch) -> None:
    monkeypatch.setattr(point_worker, "NEEDED", ("no.such.module",))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    handler = signal.getsignal(signal.SIGTERM)
    try:
        point_worker._listen()
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_more_workers_than_gpus_are_as_many_as_gpus(jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Gpu(0, "GPU-one", None)
    leased: list[str] = []

    @contextlib.contextmanager
    def lease(gpus, wait_seconds=None):
        if leased:
            raise LeaseError("taken")
        leased.append(gpus[0].uuid)
        with (tmp_path / "lease").open("w") as file:
            yield Lease(0, "GPU-one", None, file.fileno())
        leased.clear()

    monkeypatch.setattr(local_backend, "visible_gpus", lambda: [one])
    monkeypatch.setattr(local_backend, "lease", lease)
    backend = LocalBackend(3)
    assert backend.count() == 1
    assert set(run(backend, jobs("a", "b", "c")).values()) == {None}
    leased.append("by another sweep")  # which never lets it go: nobody waits once the work is stopped
    backend = LocalBackend(1)
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run(backend, jobs("d"))


@pytest.mark.parametrize("settings", [{"num_workers": 0}, {"num_workers": -1}, {"num_threads": 0}])
def test_impossible_settings_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be 1 or more"):
        LocalBackend(**settings)


def test_stopped_it_tells_running_workers_and_starts_no_more(jobs, tmp_path: Path) -> None:
    work = jobs("slow", "never")

    def stop() -> None:
        while not (tmp_path / "slow/ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        run(LocalBackend(1, on_cpu=True), work)
    assert (tmp_path / "slow/checkpoint").exists()
    assert not (tmp_path / "never/done").exists()


def test_exits_in_words() -> None:
    assert describe_exit(0) is None
    assert describe_exit(-9) == describe_exit(137)
    assert describe_exit(-15) == "killed by signal 15"
    assert describe_exit(1) == "its process ended with exit status 1"
