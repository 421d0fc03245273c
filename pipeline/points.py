"""A sweep and its points on disk: `multirun/NAME/sweep.json` and a folder shaped like the project for each point."""

import dataclasses
import functools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pipeline.config import to_settings
from pipeline.errors import DataError
from pipeline.files import read_json, write_json
from pipeline.schema import RunConfig
from pipeline.workspace import PROCESSED, QUANTIZED

POINT = "point.json"
SWEEP = "sweep.json"
PROGRESS = "progress.json"
MULTIRUN = Path("multirun")


class State(StrEnum):
    waiting = "waiting"
    running = "running"
    finished = "finished"
    failed = "failed"
    pruned = "pruned"
    interrupted = "interrupted"


@dataclass
class Point:
    """One setting of a sweep, as `point.json` of its folder holds it.

    Attributes:
        overrides: as Hydra gave them.
        swept: the keys that take more than one value in the sweep, with this point's; a group's choice by its name.
        command: makes this point alone.
        settings: of all groups, runtime too; None where the overrides compose to no valid settings.
        fingerprint: of the training.
        training, evaluation: where each came from in this sweep: `new`, `resumed`, `store`.
        seconds: spent on `train` and `evaluate` in this sweep.
        fused_with: other points trained together with it in one process.
        run_id: in MLflow.
    """

    folder: Path
    number: int
    overrides: list[str]
    swept: dict[str, Any]
    command: str
    settings: dict[str, Any] | None = None
    state: State = State.waiting
    reason: str | None = None
    fingerprint: str | None = None
    training: str | None = None
    evaluation: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    fused_with: int = 0
    run_id: str | None = None

    @functools.cached_property
    def config(self) -> RunConfig:
        """Typed settings. Raises: ConfigError: settings that cannot be."""
        return to_settings(OmegaConf.create(self.settings or {}))

    def save(self) -> None:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "folder"}
        write_json(self.folder / POINT, values)

    def end(self, state: State, reason: str | None = None) -> None:
        """Sets the state and saves it."""
        self.state, self.reason = state, reason
        self.save()

    @classmethod
    def load(cls, folder: Path) -> "Point":
        """Raises: DataError: missing, or not such a file."""
        values = read_json(folder / POINT)
        try:
            return cls(folder=folder, **{**values, "state": State(values["state"])})
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"{folder / POINT}: not a point's record ({error}). Run the sweep again.") from None


@dataclass
class Sweep:
    """What `sweep.json` holds; see `Point`.

    Attributes:
        axes: the keys that take more than one value, with these.
        points: names of the points' folders.
        started, ended: milliseconds since 1970.
        seconds: spent on it, all its runs together.
        state: running, finished, failed (a point failed) or interrupted.
        run_id: of the parent run in MLflow.
    """

    folder: Path
    command: str
    launcher: str
    axes: dict[str, list[Any]] = field(default_factory=dict)
    points: list[str] = field(default_factory=list)
    started: int = 0
    ended: int | None = None
    seconds: float = 0.0
    state: State = State.running
    run_id: str | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    def save(self) -> None:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "folder"}
        write_json(self.folder / SWEEP, {"name": self.name, **values})

    def end(self, state: State) -> None:
        self.state, self.ended = state, int(time.time() * 1000)
        self.seconds = (self.ended - self.started) / 1000
        self.save()

    def load_points(self) -> list[Point]:
        """Raises: DataError: a point's record is missing or damaged."""
        return [Point.load(self.folder / name) for name in self.points]

    @classmethod
    def load(cls, folder: Path) -> "Sweep":
        """Raises: DataError: there is no sweep (the message lists those that there are), or the file is damaged."""
        path = folder / SWEEP
        if not path.exists():
            found = [str(p.parent) for p in sorted(MULTIRUN.glob(f"*/{SWEEP}"))]
            raise DataError(f"{folder}: no sweep there. There are: {', '.join(found) or 'none yet'}.")
        values = read_json(path)
        try:
            del values["name"]
            return cls(folder=folder, **{**values, "state": State(values["state"])})
        except (TypeError, KeyError, ValueError) as error:
            raise DataError(f"{path}: not a sweep's record ({error}). Run the sweep again.") from None


def link_inputs(folder: Path, processed: Path, quantized: Path) -> None:
    """Lets the point's folder show the data and the quantized base that it shares with others."""
    for name, source in ((PROCESSED, processed), (QUANTIZED, quantized)):
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_dir() and not link.is_symlink():
            raise DataError(f"{link}: a folder stands where a link to shared data goes. Choose another output folder.")
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(source.resolve(), link.parent.resolve()), target_is_directory=True)


def describe(swept: dict[str, Any], settings: Sequence[str] | None = None) -> str:
    """A point for people: `r=4 learning_rate=0.005`."""
    keys = settings or list(swept)
    return " ".join(f"{key.rpartition('.')[2]}={_short(swept[key])}" for key in keys) or "the only point"


def _short(value: Any) -> str:
    return (
        f"{value:g}"
        if isinstance(value, float)
        else "+".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )
