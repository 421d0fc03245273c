"""A worker's question at each validation: hopeless points are given up, others are not."""

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from pipeline.pruning import make_pruner, open_storage, pruner_for, write_trial

STEPS = (0, 10, 20, 30, 40)


class Study:
    """A study in a journal, as the head has it, and folders of points."""

    def __init__(self, folder: Path, pruner: str = "median", min_steps: int = 20, direction: str = "minimize"):
        self.folder, self.pruner, self.min_steps = folder, pruner, min_steps
        self.storage = str(folder / "optuna.journal")
        self.study = optuna.create_study(
            study_name="s", storage=open_storage(self.storage), direction=direction,
            pruner=make_pruner(pruner, min_steps),
        )  # fmt: skip

    def ask(self) -> tuple[Any, Path]:
        trial = self.study.ask()
        folder = self.folder / f"{trial.number:03d}"
        write_trial(folder, self.study, trial, self.storage, self.pruner, self.min_steps)
        return trial, folder

    def train(self, level: float, last_step: int | None = None) -> int | None:
        """The step at which a point whose loss falls towards `level` is given up; None: it ends, and is told."""
        trial, folder = self.ask()
        is_hopeless = pruner_for(folder, last_step)
        assert is_hopeless is not None
        for step in STEPS:
            if is_hopeless(step, loss_at(step, level)):
                self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                return step
        value = loss_at(STEPS[-1], level)
        self.study.tell(trial, value if self.study.direction.name == "MINIMIZE" else -value)
        return None


def loss_at(step: int, level: float) -> float:
    return 4.0 if step == 0 else level + 1 / step


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_a_point_worse_than_the_median_is_given_up_after_the_warm_up(tmp_path: Path, direction: str) -> None:
    study = Study(tmp_path, direction=direction)
    assert [study.train(level) for level in (1.0, 1.1, 1.2, 1.3, 1.4)] == [None] * 5
    assert study.train(1.5) == 20
    assert study.train(1.0) is None  # a good one is not
    assert study.train(0.5) is None


def test_nothing_is_pruned_before_others_have_finished_nor_without_a_pruner(tmp_path: Path) -> None:
    study = Study(tmp_path)
    assert [study.train(level) for level in (1, 2, 3, 4, 5)] == [None] * 5
    (tmp_path / "none").mkdir()
    study = Study(tmp_path / "none", pruner="none")
    assert [study.train(level) for level in (1.0, 1.1, 1.2, 1.3, 1.4, 9.0)] == [None] * 6
    assert len(study.study.trials[5].intermediate_values) == len(STEPS)


def test_at_its_last_step_a_point_is_not_given_up(tmp_path: Path) -> None:
    study = Study(tmp_path, min_steps=40)
    assert [study.train(level) for level in (1.0, 1.1, 1.2, 1.3, 1.4)] == [None] * 5
    assert study.train(1.5, last_step=40) is None
    assert study.train(1.5) == 40


def test_hyperband_gives_up_the_worst_and_not_the_best(tmp_path: Path) -> None:
    study = Study(tmp_path, pruner="hyperband", min_steps=10)
    ends = [study.train(level) for level in [1.0, 1.1, 1.2, *[5.0, 0.5] * 6]]
    assert any(step is not None for step in ends[3::2])
    assert all(step is None or step >= 10 for step in ends)
    assert ends[0] is None
    assert ends[4] is None  # the first best


def test_a_resumed_training_may_tell_its_history_again(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    study = Study(tmp_path)
    trial, folder = study.ask()
    for _ in range(2):
        is_hopeless = pruner_for(folder)
        assert is_hopeless is not None
        for step in STEPS[:3]:
            assert not is_hopeless(step, loss_at(step, 1.0))
            assert not is_hopeless(step, loss_at(step, 1.0))
    assert study.study.trials[trial.number].intermediate_values == {s: loss_at(s, 1.0) for s in STEPS[:3]}
    assert not [str(w.message) for w in recwarn if "already reported" in str(w.message)]


def test_a_point_of_no_search_asks_nobody(tmp_path: Path) -> None:
    assert pruner_for(tmp_path) is None


def test_a_lost_study_ends_the_pruning_and_not_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study = Study(tmp_path)
    for level in (1.0, 1.1, 1.2, 1.3, 1.4):
        study.train(level)
    _, folder = study.ask()
    is_hopeless = pruner_for(folder)
    assert is_hopeless is not None
    Path(study.storage).unlink()
    Path(study.storage).mkdir()
    assert [is_hopeless(step, 99.0) for step in STEPS] == [False] * len(STEPS)
    assert caplog.text.count("the study cannot be reached") == 1


def _report(folder: Path, barrier: Any) -> None:
    is_hopeless = pruner_for(folder)
    assert is_hopeless is not None
    barrier.wait()
    for step in range(20):
        is_hopeless(step, float(json.loads((folder / "trial.json").read_text())["number"]))


def test_eight_processes_report_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    study = Study(tmp_path)
    folders = [study.ask()[1] for _ in range(8)]
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(8)
    processes = [context.Process(target=_report, args=(folder, barrier)) for folder in folders]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    seen: Callable[[Any], list[float]] = lambda trial: list(trial.intermediate_values.values())
    assert [seen(trial) for trial in study.study.trials] == [[float(i)] * 20 for i in range(8)]
