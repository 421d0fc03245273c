"""A training that is killed or interrupted, and started again, is the training that was not."""

import random
import re
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from pipeline.files import hash_path
from tests.conftest import ROOT, Project, copy_project
from tests.stages.test_dvc import make_small

TRAIN = "python -m stages.train train.eval_steps=7 runtime.system_metrics=false"
PLAIN_LORA = ("lora=all_linear", "lora=attention", "lora=mlp", "train=base", "train=qlora", "train=short")
FILES = (path for group in ("lora", "train") for path in ROOT.glob(f"conf/{group}/*.yaml"))
METHODS = sorted({f"{path.parent.name}={path.stem}" for path in FILES} - set(PLAIN_LORA))
ON_PLAIN = ("lora=pissa", "lora=olora", "lora=corda")  # not with qlora
SECONDS = 120  # until a process that just started has written a checkpoint


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = copy_project(tmp_path_factory.mktemp("resume"))
    make_small(project)
    project.run("dvc repro quantize")
    return project


class Training:
    """One training, in a store of its own, as often as it is started."""

    def __init__(self, project: Project, store: Path, overrides: str):
        self.project, self.store, self.overrides = project, store, overrides
        self.log, self.output = store.with_suffix(".log"), store.with_suffix(".outputs")

    def start(self) -> subprocess.Popen:
        command = f"exec {TRAIN} {self.overrides} runtime.output_dir={self.output}"
        with self.log.open("a") as log:
            return subprocess.Popen(
                command, shell=True, cwd=self.project.folder, env=self.project.env | {"DVC_ROOT": str(self.store)},
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def finish(self) -> str:
        """Runs it to its end; the adapter's hash."""
        assert self.start().wait(timeout=300) == 0, self.log.read_text()
        return hash_path(self.output / "models/adapter")

    def last_checkpoint(self) -> int:
        paths = self.store.glob(".training/*/checkpoints/checkpoint-*")
        return max((int(path.name.rpartition("-")[2]) for path in paths), default=0)

    def kill(self, number: signal.Signals, in_a_write: bool, pause: float) -> None:
        """Starts it, lets it get past its last checkpoint, and kills it: in the middle of a write, or after a pause."""
        before, process = self.last_checkpoint(), self.start()
        deadline = time.monotonic() + SECONDS
        while self.last_checkpoint() <= before:
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "no checkpoint came"
            time.sleep(0.002)
        if in_a_write:
            while not any(self.store.glob(".training/*/checkpoints/.unfinished-*")) and process.poll() is None:
                pass
        else:
            time.sleep(pause)
        process.send_signal(number)
        assert process.wait(timeout=60) == (130 if number is signal.SIGINT else -number), self.log.read_text()

    def tracked(self) -> list[tuple[str, int]]:
        """Run and step of every logged training loss."""
        with sqlite3.connect(f"file:{self.store / 'mlflow.db'}?mode=ro", uri=True) as database:
            return database.execute("select run_uuid, step from metrics where key = 'train.loss'").fetchall()


def check(whole: Training, killed: Training, num_steps: int, num_kills: int) -> None:
    assert killed.finish() == whole.finish()
    text = killed.log.read_text()
    resumed = [int(step) for step in re.findall(r"going on after step (\d+)", text)]
    assert len(resumed) == num_kills
    assert resumed == sorted(resumed)
    assert resumed[0] > 0
    assert "Traceback" not in text
    assert len({run for run, _ in killed.tracked()}) == 1
    assert Counter(step for _, step in killed.tracked()) == Counter(range(1, num_steps + 1))


def test_killed_in_a_write_it_ends_with_the_same_bytes(project: Project, tmp_path: Path) -> None:
    overrides = "train.max_steps=16 runtime.checkpoint_steps=2"
    killed = Training(project, tmp_path / "killed", overrides)
    killed.kill(signal.SIGKILL, in_a_write=True, pause=0)
    killed.kill(signal.SIGINT, in_a_write=False, pause=0)
    check(Training(project, tmp_path / "whole", overrides), killed, 16, num_kills=2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_twenty_random_moments_it_ends_with_the_same_bytes(project: Project, tmp_path: Path) -> None:
    overrides = "train.max_steps=150 runtime.checkpoint_steps=2 train.gradient_accumulation_steps=2"
    overrides += " lora.lora_dropout=0.1 train.early_stopping_patience=50"
    rng, killed = random.Random(0), Training(project, tmp_path / "killed", overrides)
    for i in range(20):
        killed.kill(signal.SIGKILL, in_a_write=i % 3 == 0, pause=rng.uniform(0, 0.4))
    check(Training(project, tmp_path / "whole", overrides), killed, 150, num_kills=20)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_killed_ends_with_the_same_bytes(project: Project, tmp_path: Path, method: str) -> None:
    """At a moment that follows from the method's name; every second one in a write."""
    overrides = f"train.max_steps=60 runtime.checkpoint_steps=2 {method}"
    if method in ON_PLAIN:
        overrides += " train=lora"
    killed = Training(project, tmp_path / "killed", overrides)
    pause = random.Random(method).uniform(0, 0.2)
    killed.kill(signal.SIGKILL, in_a_write=METHODS.index(method) % 2 == 0, pause=pause)
    check(Training(project, tmp_path / "whole", overrides), killed, 60, num_kills=1)
