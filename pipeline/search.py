"""An adaptive search over the points of a sweep: an optuna study in the sweep's folder that any later run goes on with.

A trial is optuna's; a point is a training in a folder. Trials that ask for the same settings share one point.
"""

import fcntl
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from pipeline.errors import ConfigError, TrainingError
from pipeline.files import write_json
from pipeline.points import POINT, Point, State
from pipeline.pruning import JOURNAL, import_optuna, make_pruner, open_storage, write_trial
from pipeline.search_settings import SearchSettings
from pipeline.search_space import Space

logger = logging.getLogger(__name__)
RESULT = "search.json"
ELSEWHERE = "Give another hydra.sweep.dir: what was trained before is taken from the store there too."


@dataclass
class Asked:
    """A point to train. Attributes:
    number: of the point: its folder and Hydra's job.
    trials: optuna's, one or more that have these settings.
    """

    number: int
    overrides: list[str]
    trials: list[Any] = field(default_factory=list)


def consecutive(points: Sequence[Asked]) -> Iterator[list[Asked]]:
    """The points in groups whose numbers follow one another, as a launcher counts them."""
    group: list[Asked] = []
    for point in sorted(points, key=lambda p: p.number):
        if group and point.number != group[-1].number + 1:
            yield group
            group = []
        group.append(point)
    if group:
        yield group


class Search:
    """The study of a sweep's folder; this process alone asks and tells, workers only report.

    Raises:
        ConfigError: the folder belongs to another search or sweep, or another process searches there; or optuna is
            not installed, or its storage cannot be used.
    """

    def __init__(self, settings: SearchSettings, space: Space, folder: Path):
        self.optuna = import_optuna()
        self.settings, self.space, self.folder = settings, space, folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _hold(self.folder / "optuna.lock")
        self.storage = settings.storage or str(self.folder / JOURNAL)
        if settings.storage is None:
            _mend(self.folder / JOURNAL)
        self.study = self.optuna.create_study(
            study_name=self.folder.name,
            storage=open_storage(self.storage),
            direction="maximize" if settings.maximize else "minimize",
            pruner=make_pruner(settings.pruner, settings.pruner_min_steps),
            load_if_exists=True,
        )
        self._check_same()

    def close(self) -> None:
        """Lets another process search here."""
        self._lock.close()

    def _check_same(self) -> None:
        """A study's values must be comparable: same objective and space (`runtime.*` changes no result)."""
        lines = sorted(line for line in self.space.lines if not line.startswith("runtime."))
        ours: dict[str, Any] = {"objective": self.settings.objective, "overrides": lines}
        if self.settings.storage is not None:  # where another's study may have this name
            ours["folder"] = str(self.folder)
        theirs = self.study.user_attrs
        if not theirs:
            if any(self.folder.glob(f"*/{POINT}")):
                raise ConfigError(f"{self.folder} holds the points of another sweep. {ELSEWHERE}")
            for name, value in ours.items():
                self.study.set_user_attr(name, value)
            return
        different = [
            f"{name}: {theirs.get(name)} there, {ours[name]} now" for name in ours if theirs.get(name) != ours[name]
        ]
        if different:
            raise ConfigError(f"study {self.folder.name} is of another search. {ELSEWHERE}\n" + "\n".join(different))

    def ask(self) -> list[Asked]:
        """The points to train next: those that a killed run left, else new ones; none: the search is over."""
        left = self._left_over()
        if left:
            logger.info("going on with %d points that were not finished", len(left))
        points = left or self._new()
        for point in points:
            folder, settings = self._folder(point.number), self.settings
            write_trial(folder, self.study, point.trials[0], self.storage, settings.pruner, settings.pruner_min_steps)
        return points

    def _new(self) -> list[Asked]:
        batch: dict[tuple[str, ...], Asked] = {}
        known = {tuple(t.user_attrs["overrides"]): t for t in reversed(self._trials()) if _has_point(t)}
        number = 1 + max((t.user_attrs["point"] for t in known.values()), default=-1)
        num_trials = len(self._trials())
        while len(batch) < self.settings.n_parallel and num_trials < self.settings.n_trials:
            if self.space.size is not None and len(known) + len(batch) >= self.space.size:
                logger.info("all %d combinations have been tried", self.space.size)
                break
            trial, overrides = self._ask(num_trials)
            num_trials += 1
            twin, key = known.get(tuple(overrides)), tuple(overrides)
            if twin is not None:
                logger.info("trial %d has the settings of trial %d: its value is taken", trial.number, twin.number)
                self._assign(trial, twin.user_attrs["point"], overrides)
                self._tell(trial, twin.state, twin.value)
                continue
            if key not in batch:
                batch[key] = Asked(number + len(batch), overrides)
            batch[key].trials.append(trial)
            self._assign(trial, batch[key].number, overrides)
        return list(batch.values())

    def tell(self, points: Sequence[Asked]) -> bool:
        """Tells optuna what became of the points, by their records; False: one was interrupted, and stays open.

        Raises:
            ConfigError: a finished point has no value of the objective.
        """
        states = [self._tell_point(asked) for asked in points]
        return all(states)

    def _tell_point(self, asked: Asked) -> bool:
        folder = self._folder(asked.number)
        if not (folder / POINT).exists():  # killed before the launcher had it
            return False
        state, trial_state = Point.load(folder).state, self.optuna.trial.TrialState
        told = {State.finished: trial_state.COMPLETE, State.pruned: trial_state.PRUNED, State.failed: trial_state.FAIL}
        if state not in told:
            return False
        value = self.settings.read_objective(folder) if state is State.finished else None
        for trial in asked.trials:
            self._tell(trial, told[state], value)
        return True

    def _left_over(self) -> list[Asked]:
        """Running trials of an earlier run; those whose point ended before that was told are told now."""
        points: dict[int, Asked] = {}
        for frozen in self._trials():
            if frozen.state is not self.optuna.trial.TrialState.RUNNING:
                continue
            trial = self.optuna.trial.Trial(self.study, frozen._trial_id)
            if not _has_point(frozen):  # killed while asking
                self._tell(trial, self.optuna.trial.TrialState.FAIL, None)
                continue
            number, overrides = frozen.user_attrs["point"], frozen.user_attrs["overrides"]
            points.setdefault(number, Asked(number, overrides)).trials.append(trial)
        return [asked for asked in points.values() if not self._tell_point(asked)]

    def _ask(self, number: int) -> tuple[Any, list[str]]:
        """A new trial and its overrides. Its random numbers follow from seed and number, however often we restart."""
        seed = int(np.random.SeedSequence([self.settings.seed, number]).generate_state(1)[0])
        samplers = self.optuna.samplers
        parallel = self.settings.n_parallel > 1
        self.study.sampler = (
            samplers.TPESampler(seed=seed, multivariate=True, constant_liar=parallel)
            if self.settings.sampler == "tpe"
            else samplers.RandomSampler(seed=seed)
        )
        trial = self.study.ask()
        return trial, self.space.suggest(trial)

    def _assign(self, trial: Any, point: int, overrides: list[str]) -> None:
        trial.set_user_attr("overrides", overrides)
        trial.set_user_attr("point", point)  # last: a trial that has it is whole

    def _tell(self, trial: Any, state: Any, value: float | None) -> None:
        complete = state is self.optuna.trial.TrialState.COMPLETE
        self.study.tell(trial, value if complete else None, state=state)

    def _folder(self, number: int) -> Path:
        return self.folder / f"{number:03d}"

    def _trials(self) -> list[Any]:
        return list(self.study.get_trials(deepcopy=False))

    def finish(self) -> list[str]:
        """Writes `search.json`; the last lines for people.

        Raises:
            TrainingError: no trial came to a value.
        """
        trials, complete = self._trials(), self.optuna.trial.TrialState.COMPLETE
        counts = ", ".join(
            f"{sum(t.state is state for t in trials)} {word}"
            for state, word in (
                (complete, "complete"),
                (type(complete).PRUNED, "pruned"),
                (type(complete).FAIL, "failed"),
            )
        )
        head = f"search {self.study.study_name}: {len(trials)} trials: {counts}"
        if not any(t.state is complete for t in trials):
            raise TrainingError(f"{head}; so there is no best one. The points' reasons are in {self.folder}/*/{POINT}.")
        best = self.study.best_trial
        point = Point.load(self._folder(best.user_attrs["point"]))
        varied = [line for line in point.overrides if line not in self.space.fixed]
        values = {
            "objective": self.settings.objective,
            "direction": "maximize" if self.settings.maximize else "minimize",
            "best": {"value": best.value, "point": point.folder.name, "overrides": varied, "command": point.command},
            "trials": [_record(t) for t in trials],
        }
        write_json(self.folder / RESULT, values)
        return [
            head,
            f"best {self.settings.objective}: {best.value:.6g} at point {point.folder.name}: {' '.join(varied)}",
            f"alone: {point.command}",
            f"written to {self.folder / RESULT}",
        ]


def _has_point(trial: Any) -> bool:
    return "point" in trial.user_attrs


def _record(trial: Any) -> dict[str, Any]:
    return {
        "number": trial.number,
        "point": f"{trial.user_attrs['point']:03d}" if _has_point(trial) else None,
        "state": trial.state.name.lower(),
        "value": trial.value,
        "overrides": trial.user_attrs.get("overrides"),
    }


def _hold(path: Path) -> TextIO:
    """The open file, locked as long as it is open. Raises: ConfigError: another process has it."""
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"another process searches in {path.parent}. Wait, or end it. {ELSEWHERE}") from None
    return file


def _mend(journal: Path) -> None:
    """Cuts off a last line that a full disk or a crash tore: optuna would read no line after it, ever again."""
    if not journal.exists():
        return
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        logger.warning("%s: its last line is torn and is left out", journal)
        with journal.open("r+b") as file:
            file.truncate(whole)
