"""Jobs on a real Ray cluster of this machine."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline import ray_backend
from pipeline.errors import ConfigError
from pipeline.jobs import Job
from pipeline.points import Point, State, Sweep
from pipeline.ray_backend import RayBackend, RayError
from tests.conftest import ROOT, copy_project
from tests.stages.test_dvc import make_small

COUNTER = [sys.executable, str(ROOT / "tests/counting_worker.py")]
KILLS_RAY_ONCE = """
import os, pathlib, signal, sys, time
tried = pathlib.Path(sys.argv[1]) / "tried"
if not tried.exists():
    tried.write_text("")
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(30)
    tried.with_name("survived").write_text("")
"""
HEAD = """
import sys
from pathlib import Path
from pipeline.jobs import Job
from pipeline.ray_backend import RayBackend
jobs = [Job(i, (folder,)) for i, folder in enumerate(sorted(Path(sys.argv[1]).glob("0*")))]
command = lambda job: [sys.executable, "tests/counting_worker.py", str(job.folders[0]), "1000"]
try:
    RayBackend(num_cpus=float(sys.argv[2])).run(jobs, lambda job, end: print(job, end), command)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    folders = [tmp_path / f"sweep/00{i}" for i in range(3)]
    for folder in folders:
        folder.mkdir(parents=True)
    return [Job(i, (folder,)) for i, folder in enumerate(folders)]


def log(job: Job) -> str:
    return (job.folders[0] / "worker.log").read_text()


def test_jobs_end_fail_and_start_again_when_ray_lost_them(jobs, caplog):
    commands = [
        [*COUNTER, str(jobs[0].folders[0]), "3"],
        ["sh", "-c", "echo no luck; exit 5"],
        [sys.executable, "-c", KILLS_RAY_ONCE, str(jobs[2].folders[0])],
    ]
    handler, before = signal.getsignal(signal.SIGTERM), psutil.Process().children()
    ends: dict[int, str | None] = {}
    backend = RayBackend()
    backend.run(jobs, lambda job, end: ends.update({job.number: end}), lambda job: commands[job.number])
    assert ends == {
        0: None,
        1: f"its process ended with exit status 5; {jobs[1].folders[0]}/worker.log ends in: no luck",
        2: None,
    }
    assert "starts at 0, CUDA_VISIBLE_DEVICES=\ncounted to 3" in log(jobs[0])  # it asked for no GPU
    assert log(jobs[2]).count("--- ") == 2
    backend.run(jobs[:1], lambda job, end: ends.update({9: end}), lambda job: ["true"])  # on the same cluster
    backend.close()
    assert ends[9] is None
    assert psutil.Process().children() == before
    assert "points 002: the machine or Ray's process was lost; again" in caplog.text
    assert not (jobs[2].folders[0] / "survived").exists()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not list(jobs[0].folders[0].parent.glob(".shared-*"))


@pytest.mark.slow
def test_a_stopped_sweep_leaves_checkpoints(jobs):
    """SIGTERM to the head: the job that runs writes its checkpoint, told once; the two that wait never start."""
    sweep, num_cpus = jobs[0].folders[0].parent, len(os.sched_getaffinity(0))
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(sweep), str(num_cpus)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (started := list(sweep.glob("*/started"))) or not started[0].read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    below = psutil.Process(head.pid).children(recursive=True)
    head.send_signal(signal.SIGTERM)
    assert head.communicate(timeout=60)[0] == "interrupted\n"
    assert int(started[0].with_name("checkpoint").read_text()) > 0
    assert list(sweep.glob("*/started")) == started
    assert psutil.wait_procs(below, timeout=10)[1] == []  # neither jobs nor Ray stay behind


@pytest.mark.slow
def test_two_jobs_get_two_gpus(jobs, monkeypatch, tmp_path):
    """With a stand-in for nvidia-smi: Ray runs two jobs at once, and each has another GPU."""
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 0, GPU-a, 81559, Disabled\necho 1, GPU-b, 81559, Disabled\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ends: list[str | None] = []
    command = ["sh", "-c", "echo has $CUDA_VISIBLE_DEVICES; sleep 4"]  # longer than from one start to the other
    backend = RayBackend(num_cpus=0.5, num_gpus=1)
    backend.run(jobs[:2], lambda job, end: ends.append(end), lambda job: command)
    backend.close()
    assert ends == [None, None]
    assert {log(job).splitlines()[-1] for job in jobs[:2]} == {"has GPU-a", "has GPU-b"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_on_ray(tmp_path):
    project = copy_project(tmp_path / "project")
    make_small(project)
    sweep = "python -m stages.train -m lora.r=2,4,500 hydra/launcher=ray hydra.sweep.dir=multirun/ray"
    said = project.run(f"{sweep} runtime.system_metrics=false", ok=False, timeout=550)
    folder = project.folder / "multirun/ray"
    points = [Point.load(folder / name) for name in Sweep.load(folder).points]
    assert [point.state for point in points] == [State.finished, State.finished, State.failed]
    assert all((folder / name / "worker.log").exists() for name in ("000", "001"))  # written by Ray's processes
    assert said.strip().splitlines()[-1].startswith("1 of 3 points failed")


def test_jobs_that_no_machine_can_take_are_refused_at_once(jobs):
    backend = RayBackend(num_cpus=1000)
    with pytest.raises(RayError, match=r"takes 1000 CPUs and 0 GPUs, and no machine has them \(\d+ CPUs"):
        backend.run(jobs, lambda job, end: None)


def test_a_cluster_that_is_not_there_is_said(jobs, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RayError, match=r"Ray cannot use the cluster at auto: .*ray status"):
        RayBackend(address="auto").run(jobs, lambda job, end: None)


def test_no_ray_is_said(jobs, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayError, match=re.escape("pip install -c constraints.txt -e '.[ray]'")):
        RayBackend().run(jobs, lambda job, end: None)


@pytest.mark.parametrize("settings", [{"num_cpus": 0}, {"num_gpus": 2}, {"num_gpus": -1}])
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError, match="more than 0 CPUs and 0 to 1 GPU"):
        RayBackend(**settings)


def test_jobs_at_once_are_what_the_machine_has_room_for(monkeypatch):
    monkeypatch.setattr(ray_backend, "visible_gpus", lambda: ["a", "b", "c"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert RayBackend(num_cpus=3).count() == 5
    assert RayBackend(num_cpus=3, num_gpus=1).count() == 3
    assert RayBackend(num_cpus=0.1, num_gpus=0.25).count() == 12
    assert RayBackend(num_cpus=17).count() == 1
