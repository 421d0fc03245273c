"""Two pipelines at once, in two clones, against one tracking store."""

import sqlite3
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import copy_project
from tests.stages.test_dvc import make_small


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_clones_share_one_fresh_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'shared.db'}"
    processes = []
    for seed in (0, 1):
        project = copy_project(tmp_path / f"clone{seed}")
        make_small(project)
        project.edit("conf/train/base.yaml", "seed: 0", f"seed: {seed}")
        project.run("python -m pipeline.config")
        log = (tmp_path / f"clone{seed}.log").open("w")
        environment = project.env | {"MLFLOW_TRACKING_URI": uri}
        processes.append(
            subprocess.Popen(
                ["dvc", "repro"], cwd=project.folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        )
    for seed, process in enumerate(processes):
        assert process.wait(timeout=600) == 0, (tmp_path / f"clone{seed}.log").read_text()
    with sqlite3.connect(tmp_path / "shared.db") as database:
        losses = database.execute("select run_uuid, step from metrics where key = 'train.loss'").fetchall()
        statuses = database.execute("select run_uuid, status from runs").fetchall()
        merged = database.execute("select distinct run_uuid from metrics where key = 'merge.mean_kl'").fetchall()
    assert len(statuses) == 2
    assert {status for _, status in statuses} == {"FINISHED"}
    assert {run for (run,) in merged} == {run for run, _ in statuses}
    assert Counter(losses) == Counter((run, step) for run, _ in statuses for step in range(1, 9))
    for seed in (0, 1):
        assert not list((tmp_path / f"clone{seed}" / ".training").glob("outbox/[!.]*/*"))
