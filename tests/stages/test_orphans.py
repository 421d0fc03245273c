"""A training whose `dvc` was killed stops by itself, and the next `dvc repro` goes on from its checkpoint."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.files import hash_path
from tests.conftest import Project, copy_project
from tests.stages.test_dvc import make_small

MAX_STEPS = 200  # a second `dvc repro` trains before an orphan that did not stop would be through
CHECKPOINT_STEPS = 2
Start = Callable[[Project, str], subprocess.Popen]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """All that the training needs."""
    project = copy_project(tmp_path_factory.mktemp("orphans") / "project")
    make_small(project)
    project.edit("conf/train/qlora.yaml", "max_steps: 8", f"max_steps: {MAX_STEPS}")
    project.edit("conf/runtime/default.yaml", "checkpoint_steps: 100", f"checkpoint_steps: {CHECKPOINT_STEPS}")
    project.edit("conf/runtime/default.yaml", "tracking: true", "tracking: false")
    project.run("python -m pipeline.config")
    project.commit("many steps")
    project.run("dvc repro quantize")
    return project


@pytest.fixture(scope="module")
def expected(project: Project) -> str:
    """What an uninterrupted training ends with."""
    whole = copy(project, "whole")
    whole.run("dvc repro train")
    return hash_path(whole.folder / "models/adapter")


def copy(project: Project, name: str) -> Project:
    target = project.folder.parent / name
    shutil.copytree(project.folder, target, symlinks=True)
    return Project(target)


@pytest.fixture
def start() -> Iterator[Start]:
    """start(project, log): `dvc repro train`; this process's child is dvc itself."""
    started: list[tuple[Project, subprocess.Popen]] = []

    def start(project: Project, log: str) -> subprocess.Popen:
        with (project.folder / log).open("w") as file:
            process = subprocess.Popen(
                ["dvc", "repro", "train"], cwd=project.folder, env=project.env,
                stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        started.append((project, process))
        return process

    yield start
    for project, process in started:  # nothing is left but where the test failed
        process.kill()
        process.wait()
        for pid in trainings(project):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def trainings(project: Project) -> set[int]:
    """The processes that run this project's stages.train."""
    found = set()
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if "stages.train" in command and "sh" not in Path(command[0]).name and process.cwd() == str(project.folder):
                found.add(process.pid)
        except psutil.Error:
            pass
    return found


def last_checkpoint(project: Project) -> int:
    paths = project.folder.glob(".training/*/checkpoints/checkpoint-*/complete.json")
    return max((int(path.parent.name.rpartition("-")[2]) for path in paths), default=0)


def owner(project: Project) -> int | None:
    """Who wrote its name into the lock last."""
    for path in project.folder.glob(".training/*/lock"):
        try:
            return json.loads(path.read_text())["process"]["pid"]
        except ValueError:  # being written
            return None
    return None


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("number", "in_a_long_step"), [(signal.SIGKILL, False), (signal.SIGTERM, True)])
def test_a_second_repro_takes_over_from_an_orphan(
    project: Project, expected: str, start: Start, number: signal.Signals, in_a_long_step: bool
) -> None:
    project = copy(project, number.name)
    first = start(project, "first.log")
    deadline = time.monotonic() + 120
    while last_checkpoint(project) < 6 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    (orphan,) = trainings(project)
    assert owner(project) == orphan
    if in_a_long_step:
        os.kill(orphan, signal.SIGSTOP)
    os.kill(first.pid, number)
    assert first.wait(timeout=20) == -number
    assert trainings(project) <= {orphan}
    killed_after = last_checkpoint(project)
    assert killed_after < MAX_STEPS - 100

    second = start(project, "second.log")
    if in_a_long_step:
        deadline = time.monotonic() + 60
        while "waiting for it to stop" not in (project.folder / "second.log").read_text():
            assert second.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(orphan, signal.SIGCONT)
    owners, taken_over, last_seen = [orphan], 0.0, 0.0
    deadline = time.monotonic() + 300
    while second.poll() is None and time.monotonic() < deadline:
        holder, running = owner(project), trainings(project)
        assert len(running) <= 2, running
        if holder is not None and holder != owners[-1]:
            owners.append(holder)
            taken_over = time.monotonic()
        if orphan in running:
            last_seen = time.monotonic()
        time.sleep(0.1)
    log = (project.folder / "second.log").read_text()
    assert second.wait(timeout=20) == 0, log
    assert len(owners) == 2, owners
    assert last_seen < taken_over + 5  # it may still be ending
    assert trainings(project) == set()
    assert "going on after step" in log
    resumed_from = int(log.partition("going on after step ")[2].split()[0])
    assert killed_after <= resumed_from < MAX_STEPS - 50
    first_log = (project.folder / "first.log").read_text()
    assert "Run the same command to go on from there." in first_log
    assert "Traceback" not in first_log + log
    assert hash_path(project.folder / "models/adapter") == expected
    assert "up to date" in project.run("dvc status train")
