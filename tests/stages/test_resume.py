"""A training that is killed or interrupted, and started again, is the training that was not."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.files import hash_path
from tests.conftest import Project, copy_project
from tests.stages.test_dvc import make_small

TRAIN = "python -m stages.train train.max_steps=40 train.eval_steps=7 runtime.checkpoint_steps=4 runtime.tracking=false"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = copy_project(tmp_path_factory.mktemp("resume"))
    make_small(project)
    project.run("dvc repro quantize")
    return project


def start(project: Project, store: Path, output: str) -> subprocess.Popen:
    command = f"exec {TRAIN} runtime.output_dir=outputs/{output}"
    log = (project.folder / f"{output}.log").open("a")
    return subprocess.Popen(
        command, shell=True, cwd=project.folder, env=project.env | {"DVC_ROOT": str(store)},
        stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def wait_for_a_checkpoint(store: Path, process: subprocess.Popen, number: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        steps = [int(p.name.rpartition("-")[2]) for p in store.glob(".training/*/checkpoints/checkpoint-*")]
        if steps and max(steps) >= number:
            return
        time.sleep(0.002)
    raise AssertionError("no checkpoint came")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_or_interrupted_it_ends_with_the_same_bytes(project: Project, tmp_path: Path) -> None:
    whole = start(project, tmp_path / "whole", "whole")
    assert whole.wait(timeout=200) == 0
    expected = hash_path(project.folder / "outputs/whole/models/adapter")
    store, rng = tmp_path / "killed", random.Random(0)
    for step, number in ((4, signal.SIGKILL), (16, signal.SIGKILL), (24, signal.SIGINT)):
        process = start(project, store, "killed")
        wait_for_a_checkpoint(store, process, step)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(number)
        assert process.wait(timeout=60) == (130 if number is signal.SIGINT else -number)
    assert start(project, store, "killed").wait(timeout=200) == 0
    log = (project.folder / "killed.log").read_text()
    assert log.count("going on after step") >= 3
    assert "Traceback" not in log
    assert hash_path(project.folder / "outputs/killed/models/adapter") == expected
    other = project.run(f"DVC_ROOT={tmp_path / 'other'} {TRAIN} train.seed=1 runtime.output_dir=outputs/other")
    assert "Traceback" not in other
    assert hash_path(project.folder / "outputs/other/models/adapter") != expected
