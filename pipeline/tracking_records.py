"""What one trained adapter leaves on disk, read as what MLflow should hold. Pure: no MLflow here.

A record is a folder shaped like the project: `models/run.json`, `metrics/`, `reports/`, `models/adapter`. A stage
measured this adapter when its `provenance.json` names the adapter's hash (`adapter_sha256`); others are left out, so
that yesterday's evaluation never lands on today's row.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.files import hash_file, hash_path, read_json
from pipeline.provenance import FILE as PROVENANCE
from pipeline.tracking_runs import RunRecord, flatten, format_value
from pipeline.workspace import ADAPTER, MERGED, RUN

STAGES = ("train", "evaluate", "merge", "gate", "harness")
PROVENANCES = {
    "evaluate": f"reports/evaluate/{PROVENANCE}",
    "merge": f"{MERGED}/{PROVENANCE}",
    "harness": f"reports/harness/{PROVENANCE}",
}
PREDICTIONS = "reports/evaluate/predictions.jsonl"
SCORES = "reports/evaluate/scores.json"
HARNESS = "reports/evaluate/harness.json"
REPORTS = {  # files and folders that a stage leaves beside its metrics
    "train": ("reports/train",),
    "evaluate": (PREDICTIONS, "reports/evaluate/items.jsonl", "reports/evaluate/contamination.jsonl", HARNESS),
    "merge": ("reports/merge", f"{MERGED}/README.md"),
    "gate": ("reports/evaluate/index.html", "reports/evaluate/index.md", "reports/evaluate/figures", SCORES),
    "harness": ("reports/harness/results.json",),  # not its tasks, which hold the test split
}
HISTORY = "reports/train/history.jsonl"
SYSTEM = "reports/train/system.jsonl"
NUM_SAMPLES = 100
EVALUATED = ("base", "quantized", "adapter")  # of the evaluate stage; others are of the merge


@dataclass(frozen=True)
class Point:
    """One value of a curve; `timestamp` in milliseconds since 1970."""

    key: str
    step: int
    value: float
    timestamp: int


@dataclass
class Record:
    """Everything of one adapter that MLflow should hold.

    Attributes:
        values: single numbers (`evaluate.adapter.loss`).
        artifacts: path in MLflow to local file; `texts` likewise, made here.
        adapter: the folder to keep as the run's model; None where this record has none.
        ended_at: milliseconds since 1970; None while the training is not done.
        left_out: one sentence for each stage whose files do not belong to this adapter.
    """

    run: RunRecord
    tags: dict[str, str] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    artifacts: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    adapter: Path | None = None
    ended_at: int | None = None
    left_out: list[str] = field(default_factory=list)


def read_record(
    folder: Path, stages: Sequence[str] = STAGES, trusted: bool = False, run: RunRecord | None = None
) -> Record:
    """Reads what the named stages left in `folder`.

    Args:
        stages: others are not looked at.
        trusted: the caller knows that every stage measured this adapter (it has just run).
        run: None: `models/run.json` of the folder.

    Raises:
        DataError: `models/run.json` is missing, or a file cannot be read.
    """
    record = Record(run or RunRecord.load(folder / RUN))
    for stage in stages:
        metrics = folder / "metrics" / f"{stage}.json"
        if not metrics.exists():
            continue
        if not trusted and not _belongs(folder, stage, record):
            continue
        _add_metrics(record, stage, read_json(metrics))
        record.artifacts[f"metrics/{stage}.json"] = metrics
        _add_settings(record, folder, stage)
        if stage == "train":
            _add_training(record, folder)
        _add_reports(record, folder, stage)
    _nest_settings(record)
    return record


def _belongs(folder: Path, stage: str, record: Record) -> bool:
    if stage == "train":
        return True
    if stage == "gate":
        return _gate_belongs(folder, record)
    path = folder / PROVENANCES[stage]
    measured = read_json(path).get("adapter_sha256") if path.exists() else None
    if measured is None:
        record.left_out.append(f"{stage}: {path} does not name its adapter")
    elif not (folder / ADAPTER).exists() or measured != hash_path(folder / ADAPTER):
        remedy = "python -m pipeline.harness" if stage == "harness" else "dvc repro"
        record.left_out.append(f"{stage}: its files are of another adapter (run `{remedy}`)")
    else:
        return True
    return False


def _gate_belongs(folder: Path, record: Record) -> bool:
    """The gate judged exactly the metrics that stand beside it, and these are this adapter's."""
    inputs = dict(
        read_json(folder / "metrics/gate.json").get("inputs", [])
    )  # pairs: DVC would show an object as metrics
    there = {name: hash_file(folder / name) for name in inputs if (folder / name).exists()}
    if not inputs or there != inputs or record.left_out:
        record.left_out.append("gate: its verdict is not of these metrics (run `dvc repro`)")
        return False
    return True


def _add_metrics(record: Record, stage: str, metrics: Mapping[str, Any]) -> None:
    for key, value in flatten(metrics, f"{stage}."):
        if key in ("gate.inputs", "train.fingerprint", "train.method"):  # a link, and what tags and params say
            continue
        if isinstance(value, bool | int | float):
            record.values[key] = float(value)
        elif value is not None:
            record.tags[key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _add_settings(record: Record, folder: Path, stage: str) -> None:
    if stage in PROVENANCES and (folder / PROVENANCES[stage]).exists():
        settings = read_json(folder / PROVENANCES[stage]).get("settings", {}).get(stage, {})
        record.tags |= {key: format_value(value) for key, value in flatten(settings, f"{stage}.")}


def _add_training(record: Record, folder: Path) -> None:
    started = record.run.started_at or int(time.time() * 1000)
    duration = int(1000 * record.values.get("train.duration_seconds", 0.0))
    record.ended_at = min(started + duration, int(time.time() * 1000))  # a stored training, recorded again, is older
    events = list(_read_lines(folder / HISTORY))
    last = max((event["step"] for event in events), default=0) or 1
    for event in events:
        when = started + duration * event["step"] // last  # steps take about equally long
        record.points += _points(event, when)
    for event in _read_lines(folder / SYSTEM):
        record.points += _points(event, event["timestamp"])
    curves = {point.key for point in record.points}
    for key in curves & record.values.keys():  # a curve and a final number of one name would hide each other
        record.values["train.final." + key.removeprefix("train.")] = record.values.pop(key)
    if (folder / ADAPTER).is_dir():
        record.adapter = folder / ADAPTER


def _points(event: Mapping[str, Any], timestamp: int) -> list[Point]:
    return [
        Point(key, event["step"], float(value), timestamp)
        for key, value in event.items()
        if key not in ("step", "timestamp") and isinstance(value, int | float)
    ]


def _add_reports(record: Record, folder: Path, stage: str) -> None:
    for path in (folder / name for name in REPORTS[stage]):
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            name = file.relative_to(folder).as_posix()
            if name == PREDICTIONS:
                with file.open(encoding="utf-8") as lines:
                    head = [line for _, line in zip(range(NUM_SAMPLES), lines, strict=False)]
                record.texts[f"samples/predictions_first_{NUM_SAMPLES}.jsonl"] = "".join(head)
            elif name != SYSTEM:
                record.artifacts[name] = file
    if stage == "gate" and (folder / SCORES).exists():
        _add_intervals(record, read_json(folder / SCORES)["estimates"])


def _add_intervals(record: Record, estimates: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> None:
    """`evaluate.adapter.loss_low` and `_high` beside `evaluate.adapter.loss`, of what is known."""
    for model, scores in estimates.items():
        stage = "evaluate" if model in EVALUATED else "merge"
        for score, estimate in scores.items():
            ends = {f"{stage}.{model}.{score}_{end}": estimate[end] for end in ("low", "high")}
            record.values |= {key: value for key, value in ends.items() if value is not None}


def _nest_settings(record: Record) -> None:
    """The params as the YAML that `params.yaml` holds."""
    import yaml

    nested: dict[str, Any] = {}
    for key, value in record.run.params.items():
        *parents, name = key.split(".")
        group = nested
        for parent in parents:
            group = group.setdefault(parent, {})
        group[name] = value
    record.texts["config/params.yaml"] = yaml.safe_dump(nested, sort_keys=True, allow_unicode=True)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            event = json.loads(line)
            event["step"] = int(event["step"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}:{number}: not an event with a step. Run `dvc repro --force train`.") from None
        yield event
