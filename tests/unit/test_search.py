"""The adaptive search: its space, its memory, and what a kill, a failure or a repeat does to it."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from omegaconf import OmegaConf

from hydra_plugins.lora_pipeline.optuna_sweeper import OptunaSweeper, OptunaSweeperConf
from pipeline.config import check_overrides, compose_config, parse_overrides
from pipeline.errors import ConfigError, TrainingError
from pipeline.points import Point, State
from pipeline.pruning import JOURNAL, open_storage
from pipeline.search import Search, consecutive
from pipeline.search_settings import SearchSettings
from pipeline.search_space import Choices, Interval, Space, parse_space

ROOT = Path(__file__).resolve().parents[2]
AXES = ("lora.r=2,4,8,16", "train.learning_rate=tag(log,interval(1e-4,1e-1))", "train.max_steps=40")


def space_of(*overrides: str) -> Space:
    return parse_space(parse_overrides(overrides))


def make_settings(**changes: Any) -> SearchSettings:
    values: dict[str, Any] = {
        "n_trials": 8, "n_parallel": 1, "seed": 0, "sampler": "tpe", "pruner": "none", "pruner_min_steps": 10,
        "objective": "train.validation_loss",
    }  # fmt: skip
    return SearchSettings(**{**values, **changes})


def loss_of(overrides: Sequence[str]) -> float:
    """Least, 0, at r 8 and a learning rate of 0.01."""
    values = dict(line.split("=") for line in overrides)
    rank = {2: 2.0, 4: 1.0, 8: 0.0, 16: 1.0}[int(values["lora.r"])]
    return rank + abs(float(values["train.learning_rate"]) - 0.01)


class Launcher:
    """Stands for the sweep's launcher: makes the points' records, without a training."""

    def __init__(self, folder: Path, outcome: Callable[[list[str]], float | State] = loss_of):
        self.folder, self.outcome = folder, outcome
        self.made: list[tuple[int, list[str]]] = []
        self.sizes: list[int] = []
        self.run = SimpleNamespace()  # what the sweeper tells the sweep's head

    num_workers, fused, max_fused = 1, False, 8

    def finish(self) -> None:
        print("the sweep has ended")

    def launch(self, job_overrides: Sequence[list[str]], initial_job_idx: int) -> None:
        self.sizes.append(len(job_overrides))
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            self.made.append((number, overrides))
            outcome = self.outcome(overrides)
            self.write(number, overrides, outcome)

    def write(self, number: int, overrides: list[str], outcome: float | State) -> None:
        folder = self.folder / f"{number:03d}"
        state = outcome if isinstance(outcome, State) else State.finished
        point = Point(folder, number, overrides, dict(o.split("=") for o in overrides), f"make {number}", state=state)
        point.save()
        if not isinstance(outcome, State):
            (folder / "metrics").mkdir()
            (folder / "metrics/train.json").write_text(json.dumps({"validation_loss": outcome}))
            adapter = {"loss": outcome, "exact_match": 1 - outcome / 10, "bleu": None}
            (folder / "metrics/evaluate.json").write_text(json.dumps({"adapter": adapter}))


def run(search: Search, launcher: Launcher) -> Search:
    while batch := search.ask():
        for group in consecutive(batch):
            launcher.launch([point.overrides for point in group], group[0].number)
        if not search.tell(batch):
            break
    return search


def trials_of(search: Search) -> list[tuple[str, float | None]]:
    return [(trial.state.name, trial.value) for trial in search.study.trials]


@pytest.mark.parametrize(
    ("override", "axis"),
    [
        ("a=16,4,8", Choices("a", ("4", "8", "16"), ordered=True)),
        ("a=1e-2,1e-3,5e-3", Choices("a", ("0.001", "0.005", "0.01"), ordered=True)),
        ("a=choice(mlp,attention)", Choices("a", ("attention", "mlp"), ordered=False)),
        ("a=true,false", Choices("a", ("False", "True"), ordered=False)),
        ("a=null,8,16", Choices("a", ("16", "8", "null"), ordered=False)),
        ("a=[q,v],[o]", Choices("a", ("[o]", "[q,v]"), ordered=False)),
        ("a='x y',z", Choices("a", ("'x y'", "z"), ordered=False)),
        ("a=range(4,17,4)", Interval("a", 4, 16, step=4)),
        ("a=range(8,2,-2)", Interval("a", 4, 8, step=2)),
        ("a=tag(log,range(1,65))", Interval("a", 1, 64, log=True)),
        ("a=range(0.0,1.0,0.25)", Choices("a", ("0.0", "0.25", "0.5", "0.75"), ordered=True)),
        ("a=interval(0,1)", Interval("a", 0.0, 1.0)),
        ("a=tag(log,interval(1e-4,1e-2))", Interval("a", 1e-4, 1e-2, log=True)),
        ("a=int(interval(4,64))", Interval("a", 4, 64)),
        ("a=tag(int,log,interval(4,64))", Interval("a", 4, 64, log=True)),
        ("a=int(tag(log,interval(4,64)))", Interval("a", 4, 64, log=True)),
    ],
)
def test_the_override_grammar_is_the_space(override: str, axis: Choices | Interval) -> None:
    found = space_of(override).axes[0]
    assert found == axis
    assert type(getattr(found, "low", None)) is type(getattr(axis, "low", None))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    texts = {found.suggest(study.ask()) for _ in range(200)}
    if isinstance(axis, Choices):
        assert texts == set(axis.texts)
    else:
        assert all(axis.low <= float(text) <= axis.high for text in texts)
        assert all(text.isdigit() for text in texts) is isinstance(axis.low, int)
        assert axis.size is None or (len(texts) <= axis.size and str(axis.high) in texts)


def test_what_cannot_be_searched_is_said_all_at_once() -> None:
    wrong = {
        "a=interval(2,1)": "the first end must be below",
        "b=tag(log,interval(0,1))": "needs ends over 0",
        "c=tag(int,interval(0.5,4))": "whole numbers",
        "d=tag(log,choice(1,2))": "tags are for interval",
        "e=tag(lg,interval(1,2))": "there are: log, int",
        "f=tag(log,range(0,9))": "from 1 or more",
        "g=range(4,4)": "the range is empty",
    }
    with pytest.raises(ConfigError) as caught:
        space_of(*wrong, "h=1,2")
    lines = str(caught.value).splitlines()
    assert len(lines) == len(wrong)
    assert all(override in line and text in line for line, (override, text) in zip(lines, wrong.items(), strict=True))
    with pytest.raises(ConfigError, match="nothing to search"):
        space_of("lora.r=4")


def test_the_command_line_has_the_last_word_and_one_value_is_fixed() -> None:
    space = space_of("lora.r=4,8", "train.seed=0,1", "lora=mlp", "lora.r=2,4,8,16", "train.seed=3")
    assert [axis.key for axis in space.axes] == ["lora.r"]
    assert space.fixed == ("train.seed=3", "lora=mlp")
    assert space.size == 4
    assert space_of("a=1,2,3", "b=range(0,5)").size == 15
    assert space_of("a=1,2,3", "b=interval(0,5)").size is None


def test_examples_of_every_axis_are_checked_against_the_schema() -> None:
    good = ["lora.r=tag(int,log,interval(4,64))", "train.learning_rate=interval(1e-4,1)", "lora=attention,mlp"]
    check_overrides(space_of(*good, "lora.target_modules=[q_proj,v_proj],mlp").examples(), "run")
    for bad in ("lora.r=interval(4,64)", "lora.lora_dropout=interval(0,2)", "lora.r=range(0,4)"):
        with pytest.raises(ConfigError, match=bad.partition("=")[0]):
            check_overrides(space_of(bad).examples(), "run")


def test_a_float_arrives_at_full_precision() -> None:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3)).ask()
    space = space_of("train.learning_rate=tag(log,interval(1e-7,1e-5))")
    config = compose_config(space.suggest(trial))
    assert config.train.learning_rate == trial.params["train.learning_rate"]


def test_the_search_finds_the_optimum_and_repeats_itself(tmp_path: Path) -> None:
    def search(name: str, **changes: Any) -> Launcher:
        launcher = Launcher(tmp_path / name)
        found = run(Search(make_settings(n_trials=30, **changes), space_of(*AXES), tmp_path / name), launcher)
        assert found.study.best_value < 0.5
        assert len(found.study.trials) == 30
        return launcher

    tpe = search("tpe")
    assert search("again").made == tpe.made
    assert search("seed", seed=1).made != tpe.made
    random = search("random", sampler="random")
    late = [[loss_of(o) for _, o in launcher.made[15:]] for launcher in (tpe, random)]
    assert sum(late[0]) < 0.6 * sum(late[1])  # tpe learns, random does not


def test_the_best_is_told_with_its_command(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    search = run(Search(make_settings(), space_of(*AXES), tmp_path), launcher)
    lines = search.finish()
    number, overrides = min(launcher.made, key=lambda made: loss_of(made[1]))
    assert f"alone: make {number}" in lines
    result = json.loads((tmp_path / "search.json").read_text())
    assert result["best"]["value"] == loss_of(overrides)
    assert result["best"]["point"] == f"{number:03d}"
    assert [trial["value"] for trial in result["trials"]] == [loss_of(o) for _, o in launcher.made]


def test_a_score_has_its_own_direction(tmp_path: Path) -> None:
    best = {}
    for name in ("exact_match", "loss"):
        folder = tmp_path / name
        settings = make_settings(objective=f"evaluate.adapter.{name}", n_trials=12)
        best[name] = run(Search(settings, space_of(*AXES), folder), Launcher(folder)).study.best_value
    assert best["exact_match"] > 0.8
    assert best["loss"] < 1
    settings = make_settings(objective="evaluate.adapter.bleu")
    with pytest.raises(ConfigError, match=r"bleu was not measured: .* has bleu, exact_match, loss"):
        run(Search(settings, space_of(*AXES), tmp_path / "bleu"), Launcher(tmp_path / "bleu"))


def test_a_failed_point_does_not_end_the_search(tmp_path: Path) -> None:
    def outcome(overrides: list[str]) -> float | State:
        return (
            State.failed
            if "lora.r=16" in overrides
            else State.pruned
            if "lora.r=2" in overrides
            else loss_of(overrides)
        )

    search = run(Search(make_settings(n_trials=20), space_of(*AXES), tmp_path), Launcher(tmp_path, outcome))
    states = [state for state, _ in trials_of(search)]
    assert len(states) == 20
    assert {"COMPLETE", "FAIL", "PRUNED"} == set(states)
    assert f"{states.count('FAIL')} failed" in search.finish()[0]

    broken = run(
        Search(make_settings(), space_of(*AXES), tmp_path / "x"), Launcher(tmp_path / "x", lambda _: State.failed)
    )
    with pytest.raises(TrainingError, match="8 failed; so there is no best"):
        broken.finish()


def test_settings_that_were_tried_are_not_trained_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    launcher = Launcher(tmp_path)
    space = space_of("lora.r=2,4,8,16", "train.learning_rate=1e-2,2e-2")
    search = run(Search(make_settings(n_trials=60, n_parallel=3, sampler="random"), space, tmp_path), launcher)
    assert len(launcher.made) == 8
    assert len({tuple(overrides) for _, overrides in launcher.made}) == 8
    assert [number for number, _ in launcher.made] == list(range(8))
    assert 8 < len(search.study.trials) < 60  # repeats are trials, and the search ends with the last combination
    assert all(t.value == loss_of(t.user_attrs["overrides"]) for t in search.study.trials)
    assert "its value is taken" in caplog.text
    assert "all 8 combinations have been tried" in caplog.text


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.unit.test_search import *

class Killed(Launcher):
    def launch(self, job_overrides, initial_job_idx):
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            with open(self.folder / "trained.txt", "a") as log:
                log.write(f"{{number}} {{' '.join(overrides)}}\\n")
            if number == {victim} and not (self.folder / "killed").exists():
                (self.folder / "killed").touch()
                self.write(number, overrides, State.running)
                os.kill(os.getpid(), signal.SIGKILL)
            self.write(number, overrides, loss_of(overrides))

folder = Path({folder!r})
search = run(Search(make_settings(n_parallel={n_parallel}), space_of(*AXES), folder), Killed(folder))
print(*search.finish(), sep="\\n")
"""


def search_in_a_process(folder: Path, victim: int, n_parallel: int = 1) -> subprocess.CompletedProcess:
    code = CHILD.format(root=str(ROOT), folder=str(folder), victim=victim, n_parallel=n_parallel)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_a_killed_search_goes_on_where_it_was(tmp_path: Path, n_parallel: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert search_in_a_process(whole, -1, n_parallel).returncode == 0
    assert search_in_a_process(killed, 4, n_parallel).returncode == -signal.SIGKILL
    again = search_in_a_process(killed, 4, n_parallel)
    assert again.returncode == 0, again.stderr
    first, second = ((folder / "trained.txt").read_text().splitlines() for folder in (whole, killed))
    assert second[:5] == first[:5]
    assert second[5] == second[4]  # the killed point: the same number and settings, so that its checkpoint is found
    assert len(second) == len(first) + 1 == 9
    if n_parallel == 1:
        assert second[5:] == first[4:]  # as if nobody had killed it
    result = json.loads((killed / "search.json").read_text())
    assert [trial["state"] for trial in result["trials"]] == ["complete"] * 8
    before = (killed / "trained.txt").read_text()
    assert search_in_a_process(killed, 4, n_parallel).returncode == 0  # nothing is left to do
    assert (killed / "trained.txt").read_text() == before


def test_an_interrupted_point_stays_open_and_is_asked_again(tmp_path: Path) -> None:
    outcomes = iter([0.5, State.interrupted, 0.7])
    first = Launcher(tmp_path, lambda _: next(outcomes))
    search = run(Search(make_settings(n_parallel=3), space_of(*AXES), tmp_path), first)
    assert [state for state, _ in trials_of(search)] == ["COMPLETE", "RUNNING", "COMPLETE"]
    search.close()
    second = Launcher(tmp_path)
    search = run(Search(make_settings(n_parallel=3, n_trials=4), space_of(*AXES), tmp_path), second)
    assert second.made[0] == first.made[1]
    assert [state for state, _ in trials_of(search)] == ["COMPLETE"] * 4


def test_a_trial_that_was_killed_while_asking_is_given_up(tmp_path: Path) -> None:
    search = Search(make_settings(n_trials=3), space_of(*AXES), tmp_path)
    search.study.ask()
    launcher = Launcher(tmp_path)
    run(search, launcher)
    assert [state for state, _ in trials_of(search)] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert [number for number, _ in launcher.made] == [0, 1]


def test_numbers_that_do_not_follow_are_launched_apart() -> None:
    points = [SimpleNamespace(number=number) for number in (7, 3, 4, 9, 8)]
    assert [[p.number for p in group] for group in consecutive(points)] == [[3, 4], [7, 8, 9]]  # type: ignore[arg-type]
    assert list(consecutive([])) == []


def test_another_search_in_the_folder_is_refused(tmp_path: Path) -> None:
    def attempt(settings: SearchSettings, *overrides: str) -> None:
        Search(settings, space_of(*overrides), tmp_path / "sweep").close()

    attempt(make_settings(), *AXES)
    attempt(make_settings(n_trials=99, pruner="median", sampler="random"), *AXES, "runtime.device=cpu")  # the same
    with pytest.raises(ConfigError, match=r"objective: train.validation_loss there, evaluate.adapter.loss now"):
        attempt(make_settings(objective="evaluate.adapter.loss"), *AXES)
    with pytest.raises(ConfigError, match=r"Give another hydra.sweep.dir"):
        attempt(make_settings(), *AXES[:2], "train.max_steps=80")
    held = Search(make_settings(), space_of(*AXES), tmp_path / "sweep")
    with pytest.raises(ConfigError, match="another process searches"):
        attempt(make_settings(), *AXES)
    held.close()
    attempt(make_settings(), *AXES)
    Launcher(tmp_path / "grid", lambda _: 1.0).launch([["lora.r=4"]], 0)
    with pytest.raises(ConfigError, match="holds the points of another sweep"):
        Search(make_settings(), space_of(*AXES), tmp_path / "grid")


def test_a_torn_journal_is_mended(tmp_path: Path) -> None:
    run(Search(make_settings(n_trials=2), space_of(*AXES), tmp_path), Launcher(tmp_path)).close()
    journal = tmp_path / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"wor')
    copy = tmp_path / "copy.journal"
    copy.write_bytes(journal.read_bytes())
    alone = optuna.load_study(study_name=tmp_path.name, storage=open_storage(str(copy)))
    with pytest.raises((json.JSONDecodeError, AttributeError)):  # without the mending every later line is lost
        _ = [alone.ask() for _ in range(3)]
    search = run(Search(make_settings(n_trials=4), space_of(*AXES), tmp_path), Launcher(tmp_path))
    assert len(search.study.trials) == 4
    assert journal.read_bytes().startswith(whole)


def test_a_database_keeps_the_study_and_no_password(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    run(Search(make_settings(storage=storage), space_of(*AXES), tmp_path / "a"), Launcher(tmp_path / "a"))
    assert len(optuna.load_study(study_name="a", storage=storage).trials) == 8
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="folder: "):  # another sweep of this name
        Search(make_settings(storage=storage), space_of(*AXES), tmp_path / "other/a")
    for wrong, text in (("postgresql://me:secret@host/db", "PGPASSWORD"), ("nosuch://host/db", "cannot be used")):
        with pytest.raises(ConfigError, match=text) as caught:
            Search(make_settings(storage=wrong), space_of(*AXES), tmp_path / "b")
        assert "secret" not in str(caught.value)


def test_wrong_settings_are_said_all_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_settings(sampler="bayes", pruner="x", objective="evaluate.base.loss", n_trials=0, n_parallel=0, seed=-1)
    names = ("sampler=bayes", "pruner=x", "objective=evaluate.base.loss", "n_trials=0", "n_parallel=0", "seed=-1")
    assert all(f"hydra.sweeper.{name}: " in str(caught.value) for name in names)
    assert len(str(caught.value).splitlines()) == len(names)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"optuna is not installed. Install it with: .*\[sweep\]"):
        Search(make_settings(), space_of(*AXES), tmp_path)


def make_sweeper(folder: Path, launcher: Any, params: dict[str, str], **changes: Any) -> OptunaSweeper:
    """The plugin as Hydra makes it, with a launcher that trains nothing."""
    values = OmegaConf.to_container(OmegaConf.structured(OptunaSweeperConf(params=params, **changes)))
    assert isinstance(values, dict)
    del values["_target_"]
    sweeper = OptunaSweeper(**values)  # type: ignore[arg-type]
    sweeper.launcher = launcher
    sweeper.hydra_context = SimpleNamespace(config_loader=None)  # type: ignore[assignment]
    sweeper.config = OmegaConf.create(
        {"hydra": {"sweep": {"dir": str(folder)}, "runtime": {"choices": {"hydra/launcher": "basic"}}}}
    )
    return sweeper


def test_the_plugin_searches_as_many_points_at_once_as_there_are_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Counting(Launcher):
        num_workers = 3

        def launch(self, job_overrides: Sequence[list[str]], initial_job_idx: int) -> None:
            notes = [json.loads((self.folder / f"{initial_job_idx + i:03d}/trial.json").read_text()) for i in range(3)]
            assert all(note["pruner"] == "median" and note["min_steps"] == 14 for note in notes)
            super().launch(job_overrides, initial_job_idx)

    launcher = Counting(tmp_path)
    params = {"lora.r": "2,4", "train.learning_rate": "tag(log,interval(1e-4,1e-1))"}
    sweeper = make_sweeper(tmp_path, launcher, params, n_trials=6)
    sweeper.sweep(["lora.r=2,4,8,16", "train.eval_steps=7"])
    assert launcher.sizes == [3, 3]
    assert all("train.eval_steps=7" in overrides for _, overrides in launcher.made)
    out = capsys.readouterr().out
    assert "6 trials: 6 complete, 0 pruned, 0 failed" in out
    assert "alone: make " in out
    assert out.startswith("the sweep has ended")
    fused = Launcher(tmp_path / "fused")
    fused.fused = True
    make_sweeper(tmp_path / "fused", fused, params, n_trials=9).sweep([])
    assert fused.sizes == [8, 1]


def test_the_plugin_answers_mistakes_and_stops_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sweep(folder: Path, *arguments: str, launcher: Any = None, **changes: Any) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            make_sweeper(folder, launcher or Launcher(folder), {}, **changes).sweep(list(arguments))
        return int(str(caught.value)), capsys.readouterr().err

    assert sweep(tmp_path / "a", "lora.r=0,4")[0] == 1
    code, text = sweep(tmp_path / "a", "lora.r=interval(4,8)")
    assert code == 1
    assert "lora.r=int(" in text
    code, text = sweep(tmp_path / "a", *AXES, launcher=object())
    assert (code, "hydra/launcher=basic makes no points" in text) == (1, True)
    code, text = sweep(tmp_path / "a", *AXES, sampler="bayes")
    assert (code, "there are tpe, random" in text) == (1, True)
    assert not (tmp_path / "a").exists()

    class Stopped(Launcher):
        def launch(self, job_overrides: Sequence[list[str]], initial_job_idx: int) -> None:
            raise KeyboardInterrupt

    code, text = sweep(tmp_path / "b", *AXES, launcher=Stopped(tmp_path / "b"))
    assert code == 130
    assert f"hydra.sweep.dir={tmp_path / 'b'}" in text
    launcher = Launcher(tmp_path / "b")
    make_sweeper(tmp_path / "b", launcher, {}, n_trials=2).sweep(list(AXES))
    assert [number for number, _ in launcher.made] == [0, 1]
