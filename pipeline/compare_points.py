"""The finished points of a sweep as their folders hold them: settings, seeds, figures, and sums over equal rows."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.evidence import FILE, SAME_SUMS, SPLITS
from pipeline.files import read_json, read_jsonl
from pipeline.points import Point, State, Sweep
from pipeline.scoring import METRICS
from pipeline.statistics import NUM_RESAMPLES, ScoreTable
from pipeline.sweep_statistics import SettingScores

SEED = "train.seed"
FORGETTING = "forgetting"  # the adapter's general_loss minus the base's, paired over the rows
HISTORY = "reports/train/history.jsonl"


@dataclass(frozen=True)
class LeftOut:
    """A point that is not compared.

    Attributes:
        kind: its state, or why a finished one is left out: `damaged`, `repeated`, `without the score`.
        state: as its record has it; empty where that cannot be read.
    """

    point: str
    kind: str
    reason: str
    state: str = State.finished


@dataclass(frozen=True)
class Rows:
    """What the adapter, and the base on general text, did on each row.

    Attributes:
        identity: equal for points on the same rows, tokens and scores.
        clusters: by split, one of a row.
        sums: by score, float64 [rows of its split, K] (`pipeline.scoring`).
        base_general: the sums of the base's general_loss; None without general text.
    """

    identity: str
    clusters: dict[str, list[str]]
    sums: dict[str, np.ndarray]
    base_general: np.ndarray | None


@dataclass(frozen=True)
class Measured:
    """A finished point: `train` and `evaluate` are its metrics files, `swept` leaves the seed out."""

    name: str
    seed: int
    swept: dict[str, Any]
    settings: dict[str, Any]
    train: dict[str, Any]
    evaluate: dict[str, Any]
    history: list[dict[str, float]]
    rows: Rows
    fused_with: int


@dataclass(frozen=True)
class Setting:
    """Points that differ in `train.seed` alone, by seed."""

    swept: dict[str, Any]
    points: dict[int, Measured] = field(default_factory=dict)

    @property
    def any_point(self) -> Measured:
        return next(iter(self.points.values()))

    @property
    def adoptable(self) -> Measured:
        """Of its seeds the one with the lowest validation loss."""
        return min(self.points.values(), key=lambda point: point.train["validation_loss"])

    def mean(self, key: str) -> float:
        """Of a number of `metrics/train.json`, over seeds."""
        return float(np.mean([point.train[key] for point in self.points.values()]))


class Group:
    """Settings that were measured on the same rows.

    Attributes:
        axes: swept keys that differ between these settings; `titles`: their short names.
        same: swept keys with one value, and this.
        scores: names of those that there are; `forgetting` stands for general_loss.
    """

    def __init__(self, settings: Sequence[Setting], num_resamples: int = NUM_RESAMPLES):
        self.settings = list(settings)
        self._num_resamples = num_resamples
        keys = list(dict.fromkeys(key for setting in settings for key in setting.swept))
        values = {key: {text_of(setting.swept.get(key)) for setting in settings} for key in keys}
        self.axes = [key for key in keys if len(values[key]) > 1]
        self.same = {key: settings[0].swept[key] for key in keys if len(values[key]) == 1}
        self.titles = short_titles(self.axes)
        self.points = {point.name: point for setting in settings for point in setting.points.values()}
        rows = settings[0].any_point.rows
        stored = [score for score in METRICS if SAME_SUMS.get(score, score) in rows.sums]
        self.scores = [FORGETTING if score == "general_loss" else score for score in stored]
        self.num_rows = {split: len(clusters) for split, clusters in rows.clusters.items()}

    @property
    def num_seeds(self) -> int:
        """The most that a setting has."""
        return max(len(setting.points) for setting in self.settings)

    def values(self, point: str) -> dict[str, float]:
        """The point's scores."""
        return {score: self._value(point, score) for score in self.scores}

    def compare(self, score: str) -> SettingScores:
        """One score of every setting, in order."""
        table, stored = self._table(score)
        values = {name: self._value(name, score) for name in self.points}
        samples = {name: table.samples(name, stored) for name in self.points}
        if score == FORGETTING:
            samples = {name: samples_R - table.samples(_base(name), stored) for name, samples_R in samples.items()}
        names = [{seed: point.name for seed, point in setting.points.items()} for setting in self.settings]
        metric, num_clusters = METRICS[stored], table.num_clusters(stored)
        lowest = -math.inf if score == FORGETTING else 0.0
        return SettingScores(
            names, values, samples, num_clusters, metric.higher_is_better, metric.is_proportion, lowest
        )

    def _value(self, point: str, score: str) -> float:
        table, stored = self._table(score)
        return table.value(point, stored) - (table.value(_base(point), stored) if score == FORGETTING else 0.0)

    def _table(self, score: str) -> tuple[ScoreTable, str]:
        return (self._tables["general"], "general_loss") if score == FORGETTING else (self._tables["test"], score)

    @cached_property
    def _tables(self) -> dict[str, ScoreTable]:
        """By split, each resampled on its own."""
        rows = {name: point.rows for name, point in self.points.items()}
        scores = [score for score in self.scores if score != FORGETTING]
        sums = {
            (name, score): found.sums[SAME_SUMS.get(score, score)] for name, found in rows.items() for score in scores
        }
        general = {(name, "general_loss"): found.sums.get("general_loss") for name, found in rows.items()}
        general |= {(_base(name), "general_loss"): found.base_general for name, found in rows.items()}
        made = {"test": sums, "general": {key: found for key, found in general.items() if found is not None}}
        clusters = self.settings[0].any_point.rows.clusters
        return {
            split: ScoreTable(made[split], METRICS, clusters[split], self._num_resamples, seed)
            for seed, split in enumerate(SPLITS)
            if made[split]
        }


def _base(point: str) -> str:
    return f"base of {point}"


def short_titles(keys: Sequence[str]) -> list[str]:
    """The last part of each key; the whole key where two would be the same."""
    lasts = [key.rpartition(".")[2] for key in keys]
    return [last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)]


def text_of(value: Any) -> str:
    """A value for people: `0.005`, `q_proj+v_proj`; `-` for a key that the point does not have."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return "+".join(map(text_of, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_groups(sweep: Sweep) -> tuple[list[Group], list[LeftOut]]:
    """The finished points by the rows that they were measured on, the largest group first; and those left out.

    Raises:
        DataError: no point has finished.
    """
    measured: list[Measured] = []
    left_out: list[LeftOut] = []
    for name in sweep.points:
        state = ""
        try:
            point = Point.load(sweep.folder / name)
            state = point.state
            if point.state is State.finished:
                measured.append(_read(point))
            else:
                left_out.append(LeftOut(name, state, point.reason or "no reason was recorded", state))
        except (DataError, OSError) as error:
            left_out.append(LeftOut(name, "damaged", f"{error} The sweep's own command makes the point again.", state))
    if not measured:
        reasons = "".join(f"\n  {entry.point} {entry.kind}: {entry.reason}" for entry in left_out[:10])
        raise DataError(
            f"{sweep.folder}: none of its {len(sweep.points)} points can be compared; run the sweep again, which goes "
            f"on where it stopped: {sweep.command}{reasons}"
        )
    groups: dict[str, dict[str, Setting]] = {}
    for done in measured:
        settings = groups.setdefault(done.rows.identity, {})
        setting = settings.setdefault(json.dumps(done.swept, sort_keys=True), Setting(done.swept))
        if done.seed in setting.points:
            twin = setting.points[done.seed].name
            left_out.append(LeftOut(done.name, "repeated", f"the settings and the seed of point {twin}"))
        else:
            setting.points[done.seed] = done
    found = [Group(list(settings.values())) for settings in groups.values()]
    return sorted(found, key=lambda group: -len(group.points)), left_out


def _read(point: Point) -> Measured:
    """Raises: DataError: a file is missing, damaged, or lacks what a finished point has."""
    folder = point.folder
    train, evaluate = (read_json(folder / "metrics" / f"{name}.json") for name in ("train", "evaluate"))
    try:
        for key in ("trainable_parameters", "validation_loss", "training_seconds", "peak_memory_bytes"):
            float(train[key])
        evaluate["base"]["loss"]
        swept = {key: value for key, value in point.swept.items() if key != SEED}
        settings = point.settings or {}
        return Measured(
            folder.name, int(settings["train"]["seed"]), swept, settings, train, evaluate,
            read_jsonl(folder / HISTORY), _read_rows(read_jsonl(folder / "reports/evaluate" / FILE)), point.fused_with,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder}: what it holds is not what a finished point has ({error!r}).") from None


def _read_rows(items: Sequence[Mapping[str, Any]]) -> Rows:
    digest = hashlib.sha256()
    clusters: dict[str, list[str]] = {}
    sums: dict[str, list[list[float]]] = {}
    base: list[list[float]] = []
    for item in items:
        adapter = item["models"]["adapter"]
        tokens = [adapter[score][1] for score in ("loss", "general_loss") if score in adapter]
        digest.update(json.dumps([item["split"], item["row_id"], item["cluster"], tokens, sorted(adapter)]).encode())
        clusters.setdefault(item["split"], []).append(item["cluster"])
        for score, values in adapter.items():
            sums.setdefault(score, []).append(values)
        if "general_loss" in adapter:
            base.append(item["models"]["base"]["general_loss"])
    if "loss" not in sums:
        raise DataError(f"{FILE}: no row of the test split.")
    arrays = {score: np.array(values, dtype=np.float64) for score, values in sums.items()}
    return Rows(digest.hexdigest(), clusters, arrays, np.array(base, dtype=np.float64) if base else None)
