"""Sweeps for real: nothing trained twice, one bad point alone, kills and interrupts, points that are what they say."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.files import hash_path
from pipeline.points import Point, State, Sweep
from tests.conftest import Project, copy_project
from tests.stages.test_dvc import make_small

SWEEP = "python -m stages.train -m runtime.system_metrics=false"
LONG = "train.max_steps=60 train.eval_steps=20 runtime.checkpoint_steps=5"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Small; a sweep `first` of three points, one of which cannot be."""
    project = copy_project(tmp_path_factory.mktemp("sweeps"))
    make_small(project)
    project.first = project.run(f"{SWEEP} lora.r=2,4,500 hydra.sweep.dir=multirun/first", ok=False)  # type: ignore[attr-defined]
    return project


def points(project: Project, name: str) -> dict[str, Point]:
    folder = project.folder / "multirun" / name
    return {point: Point.load(folder / point) for point in Sweep.load(folder).points}


def trained(project: Project) -> set[str]:
    """Fingerprints of the finished trainings."""
    return {path.parent.name for path in project.folder.glob(".training/*/result.json") if len(path.parent.name) == 64}


def adapter(project: Project, point: str) -> str:
    return hash_path(project.folder / "multirun" / point / "models/adapter")


def test_a_point_that_cannot_be_fails_alone_and_is_named_last(project: Project) -> None:
    found = points(project, "first")
    assert [point.state for point in found.values()] == [State.finished, State.finished, State.failed]
    last = project.first.strip().splitlines()[-2:]  # type: ignore[attr-defined]
    assert "failed: 002 (r=500): lora.r: 500 is over the width" in last[0]
    assert last[1].startswith("1 of 3 points failed")
    assert found["002"].reason.startswith("lora.r: 500 is over the width")
    for name in ("000", "001"):
        metrics = json.loads((project.folder / f"multirun/first/{name}/metrics/evaluate.json").read_text())
        assert metrics["adapter"]["num_tokens"] == metrics["base"]["num_tokens"] > 0


def test_nothing_of_it_lies_where_dvc_keeps_its_own(project: Project) -> None:
    assert not (project.folder / "models/adapter").exists()
    status = project.run("git status --porcelain")
    assert {line.split()[-1] for line in status.splitlines()} <= {
        "dvc.lock",
        "metrics/prepare.json",
        "metrics/quantize.json",
    }


def test_points_are_children_of_the_sweep_in_mlflow_with_settings_and_scores(project: Project) -> None:
    with sqlite3.connect(f"file:{project.folder}/mlflow.db?mode=ro", uri=True) as database:
        tags = dict(database.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'"))
        ranks = dict(database.execute("select run_uuid, value from params where key = 'lora.r'"))
        losses = dict(
            database.execute("select run_uuid, value from latest_metrics where key = 'evaluate.adapter.loss'")
        )
    sweep = Sweep.load(project.folder / "multirun/first")
    children = [run for run, parent in tags.items() if parent == sweep.run_id]
    assert sorted(ranks[run] for run in children) == ["2", "4", "500"]
    assert {ranks[run] for run in children if run in losses} == {"2", "4"}


def test_widened_it_trains_only_what_is_new(project: Project) -> None:
    before = trained(project)
    output = project.run(f"{SWEEP} lora.r=2,4 lora.target_modules=all_linear,attention hydra.sweep.dir=multirun/wide")
    assert len(trained(project) - before) == 2
    found = points(project, "wide")
    sources = {(p.swept["lora.r"], p.swept["lora.target_modules"]): p.training for p in found.values()}
    assert sources == {
        (2, "all_linear"): "store",
        (4, "all_linear"): "store",
        (2, "attention"): "new",
        (4, "attention"): "new",
    }
    assert "best: " in output
    assert adapter(project, "wide/000") == adapter(project, "first/000")


def test_repeated_it_comes_from_the_store(project: Project) -> None:
    before = trained(project)
    output = project.run(f"{SWEEP} lora.r=2,4 hydra.sweep.dir=multirun/again")
    assert "2 points, 0 to do, 2 from the store" in output
    assert trained(project) == before


def test_the_command_of_a_point_makes_it_alone_from_the_store(project: Project) -> None:
    point = points(project, "first")["001"]
    assert point.command == "python -m stages.point runtime.system_metrics=False lora.r=4"
    output = project.run(f"{point.command} runtime.output_dir=outputs/alone")
    assert "taken from .training/" in output
    assert hash_path(project.folder / "outputs/alone/models/adapter") == adapter(project, "first/001")


def test_an_altered_adapter_in_the_store_is_trained_again(project: Project) -> None:
    project.run(f"{SWEEP} lora.r=3 hydra.sweep.dir=multirun/three")
    point = points(project, "three")["000"]
    before = adapter(project, "three/000")
    stored = project.folder / ".training" / str(point.fingerprint) / "adapter/adapter_model.safetensors"
    content = stored.read_bytes()
    stored.unlink()
    stored.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    project.run(f"{SWEEP} lora.r=3 hydra.sweep.dir=multirun/three")
    assert points(project, "three")["000"].training == "new"
    assert adapter(project, "three/000") == before


def test_data_are_prepared_once_a_value(project: Project) -> None:
    project.run(f"{SWEEP} data.max_rows=60,80 lora.r=2,4 hydra.sweep.dir=multirun/rows")
    found = points(project, "rows")
    folders = {p.swept["data.max_rows"]: (p.folder / "data/processed").resolve() for p in found.values()}
    assert len({str(folder) for folder in folders.values()}) == 2
    for rows, folder in folders.items():
        assert json.loads((folder.parent.parent / "metrics/prepare.json").read_text())["train"]["num_rows"] == rows
    quantized = {(p.folder / "models/quantized").resolve() for p in found.values()}
    assert quantized == {project.folder / "models/quantized"}


def start(project: Project, arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        f"exec {SWEEP} {arguments}", shell=True, cwd=project.folder, env=project.env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def wait_for(found: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 150
    while not found():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def step(project: Project, point: str) -> int:
    paths = (project.folder / "multirun" / point).glob("progress.json")
    return max((json.loads(path.read_text())["step"] for path in paths), default=0)


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if "pipeline.point_worker" in child.cmdline()]


@pytest.mark.slow
def test_a_killed_worker_costs_one_point_which_goes_on_at_the_next_run(project: Project) -> None:
    arguments = f"{LONG} lora.r=5,6 hydra.sweep.dir=multirun/killed"
    process = start(project, arguments)
    wait_for(lambda: step(project, "killed/000") >= 10, process)
    workers(process)[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1, output
    found = points(project, "killed")
    assert [point.state for point in found.values()] == [State.failed, State.finished]
    assert "killed by signal 9" in found["000"].reason
    project.run(f"{SWEEP} {arguments}")
    assert [point.training for point in points(project, "killed").values()] == ["resumed", "store"]
    project.env["DVC_ROOT"] = str(project.folder / "elsewhere")  # another store: trained from the start
    (project.folder / "elsewhere").mkdir()
    try:
        project.run(f"{SWEEP} {LONG} lora.r=5 hydra.sweep.dir=multirun/whole")
    finally:
        del project.env["DVC_ROOT"]
    assert adapter(project, "whole/000") == adapter(project, "killed/000")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_sweep_leaves_nobody_behind_and_goes_on(project: Project, number: signal.Signals) -> None:
    name = f"stopped{number.value}"
    arguments = f"{LONG} train.seed={number.value} lora.r=2,3 hydra.sweep.dir=multirun/{name}"
    process = start(project, arguments)
    wait_for(lambda: step(project, f"{name}/000") >= 10, process)
    left = workers(process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=100)
    psutil.wait_procs(left, timeout=60)
    assert left
    assert not any(child.is_running() for child in left)
    if number is not signal.SIGKILL:
        assert process.returncode == 130, output
        assert "Run the same command to go on from there" in output
        assert {point.state for point in points(project, name).values()} == {State.interrupted}
    project.run(f"{SWEEP} {arguments}")
    assert points(project, name)["000"].training == "resumed"


def test_points_that_differ_in_their_evaluation_alone_are_trained_once_and_evaluated_each(project: Project) -> None:
    before = trained(project)
    project.run(f"{SWEEP} lora.r=2 evaluate.max_new_tokens=4,8 hydra.sweep.dir=multirun/evaluations")
    assert trained(project) == before
    found = points(project, "evaluations")
    assert [point.state for point in found.values()] == [State.finished, State.finished]
    items = [(point.folder / "reports/evaluate/predictions.jsonl").read_text() for point in found.values()]
    assert items[0] != items[1]


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_makes_the_sweep_fail(project: Project) -> None:
    process = start(project, f"{LONG} train.seed=5 lora.r=5 hydra.sweep.dir=multirun/told")
    wait_for(lambda: step(project, "told/000") >= 10, process)
    workers(process)[0].terminate()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1, output
    assert "interrupted: 000" in output


@pytest.mark.slow
def test_a_second_sweep_in_the_same_folder_is_refused(project: Project) -> None:
    arguments = f"{LONG} train.seed=6 lora.r=2 hydra.sweep.dir=multirun/shared"
    process = start(project, arguments)
    wait_for(lambda: step(project, "shared/000") >= 1, process)
    assert "another sweep is at work there" in project.run(f"{SWEEP} {arguments}", ok=False)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output


@pytest.mark.slow
def test_two_sweeps_over_the_same_points_train_each_once(project: Project) -> None:
    arguments = f"{LONG} train.seed=77 lora.r=2,3 hydra.sweep.dir=multirun"
    both = [start(project, f"{arguments}/twin{i}") for i in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output
    sources = [point.training for i in range(2) for point in points(project, f"twin{i}").values()]
    assert sources.count("new") == 2
    assert sources.count("store") == 2


def test_a_stage_that_makes_no_sense_many_times_says_so(project: Project) -> None:
    output = project.run("python -m stages.merge -m merge.dtype=float16,float32", ok=False)
    assert "sweep with `python -m stages.train -m`" in output
    assert "Traceback" not in output


def test_a_typo_in_an_axis_stops_before_anything(project: Project) -> None:
    output = project.run(f"{SWEEP} lora.rr=1,2", ok=False)
    assert "lora.rr: no such setting; did you mean lora.r?" in output
    assert re.search(r"Traceback", output) is None
    assert os.listdir(project.folder / "multirun")
    assert not any("rr" in p.read_text() for p in Path(project.folder).glob("multirun/*/sweep.json"))
