"""A real search: trained, pruned, killed and gone on with."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import Project, copy_project
from tests.stages.test_dvc import make_small

SWEEP = (
    "exec python -m stages.train -m hydra/sweeper=optuna hydra.sweep.dir=multirun/search hydra.sweeper.n_trials=9 "
    "hydra.sweeper.n_parallel=3 hydra.sweeper.sampler=random lora.r=2,4 "
    "'train.learning_rate=tag(log,interval(1e-5,1e-2))' train.eval_steps=2 runtime.device=cpu"
)
SECONDS = 240


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = copy_project(tmp_path_factory.mktemp("search"))
    make_small(project)
    return project


def points(project: Project) -> dict[str, dict]:
    paths = sorted((project.folder / "multirun/search").glob("*/point.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def kill_in_the_second_batch(project: Project, log: Path) -> None:
    with log.open("w") as file:
        process = subprocess.Popen(
            SWEEP, shell=True, cwd=project.folder, env=project.env, stdout=file, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + SECONDS
    while not (project.folder / "multirun/search/004/progress.json").exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(point["state"] == "running" for point in points(project).values()):  # the worker notices
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_that_is_killed_goes_on_and_gives_hopeless_points_up(project: Project, tmp_path: Path) -> None:
    kill_in_the_second_batch(project, tmp_path / "log")
    before = points(project)
    done = {name for name, point in before.items() if point["state"] == "finished"}
    assert {"000", "001", "002"} <= done < set(before)
    run_ids = {name: before[name]["run_id"] for name in done}
    started = time.time()
    text = project.run(SWEEP, timeout=600)
    assert "Traceback" not in text
    after = points(project)
    assert list(after) == [f"{number:03d}" for number in range(9)]
    for name in done:  # neither trained nor written again
        assert (project.folder / f"multirun/search/{name}/metrics/train.json").stat().st_mtime < started
        assert after[name]["run_id"] == run_ids[name]
    assert all(after[name]["overrides"] == before[name]["overrides"] for name in before)

    states = {name: point["state"] for name, point in after.items()}
    assert set(states.values()) == {"finished", "pruned"}
    rates = {name: next(float(o.partition("=")[2]) for o in p["overrides"] if "rate" in o) for name, p in after.items()}
    pruned = [rates[name] for name, state in states.items() if state == "pruned"]
    judged = [name for name in states if name >= "006"]  # five had finished before these began
    best = max(judged, key=rates.__getitem__)
    assert pruned
    assert max(pruned) < sorted(rates.values())[len(rates) // 2]  # in 8 steps, more learning is better
    assert states[best] == "finished"

    result = json.loads((project.folder / "multirun/search/search.json").read_text())
    assert [trial["state"] for trial in result["trials"]].count("pruned") == len(pruned)
    losses = {
        name: json.loads((project.folder / f"multirun/search/{name}/metrics/train.json").read_text())["validation_loss"]
        for name, state in states.items()
        if state == "finished"
    }
    assert result["best"]["value"] == min(losses.values())
    assert result["best"]["point"] == min(losses, key=losses.__getitem__)
    assert result["best"]["command"] in text

    again = time.time()
    assert f"alone: {result['best']['command']}" in project.run(SWEEP)
    assert not [p for p in (project.folder / "multirun/search").glob("*/metrics/*.json") if p.stat().st_mtime > again]


def test_mistakes_are_answered_before_anything_runs(project: Project) -> None:
    for change, answers in (
        ("hydra.sweeper.sampler=bayes hydra.sweeper.objective=evaluate.adapter.f1", ("there are tpe", "train.valid")),
        ("'train.learning_rate=tag(lg,interval(1e-4,1e-3))'", ("there are: log, int",)),
    ):
        text = project.run(f"{SWEEP.replace('multirun/search', 'multirun/wrong')} {change}", ok=False)
        assert all(answer in text for answer in answers)
        assert "Traceback" not in text
    assert not (project.folder / "multirun/wrong").exists()
