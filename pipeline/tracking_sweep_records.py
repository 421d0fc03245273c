"""What a sweep's folder holds, read as what MLflow should hold: the runs of the sweep and of its points. Pure."""

import hashlib
import math
from collections import Counter
from pathlib import Path

from pipeline.errors import DataError
from pipeline.files import read_json
from pipeline.points import POINT, Point, State, Sweep, describe
from pipeline.tracking_records import Record
from pipeline.tracking_runs import PARAM_GROUPS, RunRecord, describe_params, flatten, format_value
from pipeline.workspace import RUN

COMPARISON = "comparison"


def parent_record(sweep: Sweep, sweep_id: str) -> Record:
    """What was swept, how it ended, and the comparison.

    Args:
        sweep_id: the parent's key in every store.

    Raises:
        DataError: a point's record or the comparison is damaged.
    """
    points = [Point.load(sweep.folder / name) for name in sweep.points if (sweep.folder / name / POINT).exists()]
    counts = Counter(str(point.state) for point in points)
    axes = {key: ", ".join(map(format_value, values)) for key, values in sweep.axes.items()}
    tags = {"sweep": sweep.name, "command": sweep.command, "launcher": sweep.launcher, "state": str(sweep.state)}
    tags |= {f"swept.{key}": values for key, values in axes.items()}
    tags["mlflow.note.content"] = "\n\n".join(
        [
            f"`{sweep.command}`",
            "\n".join(f"- {key}: {values}" for key, values in axes.items()),
            f"{len(sweep.points)} points: {', '.join(f'{number} {state}' for state, number in sorted(counts.items()))}",
            f"A point that a newer sweep has too is a child there. All of them: `tags.sweeps LIKE '%{sweep.name}%'`",
            "\n".join(f"- {p.folder.name} {describe(p.swept)}: {p.reason.splitlines()[0]}" for p in points if p.reason),
        ]
    )
    short = " × ".join(key.rpartition(".")[2] for key in axes)
    name = f"{sweep.name} · {len(sweep.points)} points{f' · {short}' if short else ''}"
    values = {f"sweep.num_{state}": float(counts[state]) for state in State if state is not State.running}
    values["sweep.num_points"] = float(len(sweep.points))
    values |= {"sweep.seconds": sweep.seconds} if sweep.ended else {}
    found_tags, found_values = _read_comparison(sweep.folder)
    files = {p.relative_to(sweep.folder).as_posix(): p for p in (sweep.folder / COMPARISON).rglob("*") if p.is_file()}
    run = RunRecord(sweep_id, name, {}, tags | found_tags, started_at=sweep.started or None)
    return Record(run, values=values | found_values, artifacts=files)


def _read_comparison(folder: Path) -> tuple[dict[str, str], dict[str, float]]:
    """Tags and numbers of the best setting and of the smallest that is not shown to be worse."""
    path = folder / COMPARISON / "settings.json"
    if not path.exists():
        return {}, {}
    content = read_json(path)
    tags: dict[str, str] = {}
    values: dict[str, float] = {}
    try:
        for name in ("best", "smallest"):
            setting = content[name]
            tags |= {f"{name}.point": setting["point"], f"{name}.settings": describe(setting["swept"])}
            numbers = {key: setting[key] for key in ("trainable_parameters", "training_seconds", "validation_loss")}
            numbers |= {f"test.{score}": found["value"] for score, found in setting["scores"].items()}
            values |= {f"{name}.{key}": float(value) for key, value in numbers.items() if value is not None}
    except (KeyError, TypeError, AttributeError):
        remedy = f"Make it again with `python -m pipeline.compare {folder}`."
        raise DataError(f"{path}: not a comparison. {remedy}") from None
    return tags, values


def point_run(point: Point, sweep_id: str | None) -> RunRecord:
    """The run that its training opened, or one for a point that failed before."""
    if (point.folder / RUN).exists():
        return RunRecord.load(point.folder / RUN)
    settings = {group: point.settings[group] for group in PARAM_GROUPS} if point.settings else point.swept
    params = dict(flatten(settings))
    place = f"{sweep_id}/{point.number}"  # settings that cannot be have no fingerprint
    key = point.fingerprint or hashlib.sha256(place.encode()).hexdigest()
    name = f"{describe_params(params)} · {key[:6]}" if point.settings else describe(point.swept)
    tags = {"method": str(params["train.method"])} if point.settings else {}
    ended = (point.folder / POINT).stat().st_mtime
    started = int(1000 * (ended - math.fsum(point.seconds.values())))
    return RunRecord(key, name, params, tags | {"fingerprint": key}, started_at=started)
