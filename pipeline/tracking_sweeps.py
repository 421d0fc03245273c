"""Sweeps in MLflow: a parent run a sweep, the runs of its adapters as its children, equal to `multirun/NAME`.

An adapter of several sweeps is one run: a child of the newest of them, with the names of all in its tag `sweeps`.
What was sent is marked in the folder (`.tracking.json`), so that sending it again costs one query a sweep.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, PipelineError
from pipeline.files import read_json, write_json
from pipeline.points import POINT, Point, Sweep
from pipeline.schema import RuntimeConfig
from pipeline.tracking_records import STAGES, read_record
from pipeline.tracking_runs import PARENT, RunRecord
from pipeline.tracking_store import (
    Store,
    import_mlflow,
    open_store,
    push_seconds,
    store_lock,
    store_uri,
    unusable,
    within,
)
from pipeline.tracking_sweep_records import COMPARISON, parent_record, point_run
from pipeline.workspace import RUN

logger = logging.getLogger(__name__)
MARK = ".tracking.json"
SENT = ("metrics", "reports", "models/adapter", RUN)  # of a point's folder
STATUS = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "pruned": "KILLED", "interrupted": "KILLED"}
MEASURED = "evaluate.adapter.loss"
PAUSE_SECONDS = 60.0  # after a failure, points are left to `record_sweep`: a server that hangs costs seconds each time
_failed_at = -math.inf


def tag_point(record: RunRecord, sweep: str, parent_run_id: str | None, number: int, command: str) -> RunRecord:
    """The record of a training as a child of the sweep's run; without a parent, `sync` links it later."""
    tags = {"sweep": sweep, "sweeps": sweep, "point": f"{number:03}", "command": command}
    if parent_run_id is not None:
        tags[PARENT] = parent_run_id
    return dataclasses.replace(record, tags=record.tags | tags)


def open_sweep(folder: Path, runtime: RuntimeConfig) -> str | None:
    """Makes the sweep's parent run, or finds it, RUNNING. Never raises.

    Returns:
        Its id, to be kept in `sweep.json`; None when `runtime.tracking` is false or the store is out of reach.
    """

    def open_parent() -> str | None:
        with _locked(folder):
            return _push_parent(open_store(), folder)

    return _attempt(open_parent, folder, runtime, push_seconds())


def record_point(folder: Path, runtime: RuntimeConfig) -> str | None:
    """Sends what an ended point's folder holds. Call it when `point.json` says how it ended. Never raises.

    Returns:
        The run's id in the store; None when nothing was sent (`record_sweep` and `sync` try again).
    """

    def send() -> str | None:
        sweep = Sweep.load(folder.parent)
        line = _push_point(open_store(), folder, sweep, sweep.run_id)
        logger.info("MLflow: %s", line)
        return _read_mark(folder).get("run_id")

    if time.monotonic() < _failed_at + PAUSE_SECONDS:
        return None
    return _attempt(send, folder, runtime, push_seconds(folder))


def record_sweep(folder: Path, runtime: RuntimeConfig) -> str | None:
    """Sends what is not in the store yet of the points, then the comparison and how the sweep ended. Never raises.

    Returns:
        The parent's run id; None when the store was out of reach (`sync` sends it later).
    """

    def send() -> str | None:
        for line in sync_sweep(open_store(), folder):
            logger.info("MLflow: %s", line)
        return _read_mark(folder).get("run_id")

    unsent = [p.parent for p in folder.glob(f"*/{POINT}") if not (p.parent / MARK).exists()]
    return _attempt(send, folder, runtime, push_seconds(*unsent) + len(unsent))


def _attempt(action: Callable[[], str | None], folder: Path, runtime: RuntimeConfig, seconds: float) -> str | None:
    global _failed_at
    if not runtime.tracking:
        return None
    try:
        import_mlflow()
        return within(seconds, action)
    except Exception as error:  # whatever MLflow, its database or the disk raises
        _failed_at = time.monotonic()
        text = error if isinstance(error, PipelineError) else unusable(store_uri(), error)
        logger.warning("%s `python -m pipeline.tracking sync` sends %s.", text, folder)
        return None


def sync_sweep(store: Store, folder: Path) -> list[str]:
    """Makes MLflow equal to the sweep's folder; a line for each run that was not.

    Raises:
        DataError: `sweep.json` cannot be read.
        MlflowException, OSError: the store fails half-way; calling again goes on from there.
    """
    with _locked(folder):
        sweep = Sweep.load(folder)
        parent = _push_parent(store, folder)
        if parent is None:
            return [f"{sweep.name}: deleted in MLflow, not made again (`mlflow runs restore` brings it back)"]
        lines = []
        for name in sweep.points:
            try:
                lines.append(_push_point(store, folder / name, sweep, parent))
            except DataError as error:
                lines.append(f"{sweep.name}/{name}: {error}")
        return [line for line in lines if line]


def _locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    return store_lock("sweep-" + hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16])


def _read_mark(folder: Path) -> dict[str, Any]:
    """What this folder sent; a damaged mark counts as none, and all is sent again."""
    with contextlib.suppress(DataError):
        return dict(read_json(folder / MARK))
    return {}


def _push_parent(store: Store, folder: Path) -> str | None:
    """Run id of the parent, up to date; None when somebody deleted it in MLflow. Call it with the folder's lock."""
    from pipeline.tracking_push import deleted_by_hand, ensure_run, push

    sweep, mark = Sweep.load(folder), _read_mark(folder)
    if "sweep_id" not in mark:
        mark = {"sweep_id": uuid.uuid4().hex}  # a name is not enough: another clone, or a later sweep, may have it too
        write_json(folder / MARK, mark)
    record = parent_record(sweep, mark["sweep_id"])
    if deleted_by_hand(store, record.run.fingerprint):
        return None
    sent = {"run": dataclasses.asdict(record.run), "values": record.values, "files": _stat(folder, COMPARISON)}
    signature = _hash([*sent.values(), sweep.state])
    run_id, _ = ensure_run(store, record.run)
    if mark.get("run_id") == run_id and mark.get("signature") == signature:
        return run_id
    push(store, record)
    _set_status(store, run_id, str(sweep.state), sweep.ended)
    store.client.update_run(run_id, name=record.run.run_name)  # it says how many points there are
    write_json(folder / MARK, mark | {"run_id": run_id, "signature": signature})
    return run_id


def _push_point(store: Store, folder: Path, sweep: Sweep, parent: str | None) -> str:
    """One line, empty when nothing was to be sent."""
    from pipeline.tracking_push import deleted_by_hand, push, start_time

    point, mark = Point.load(folder), _read_mark(folder)
    if point.state in ("waiting", "running"):
        return ""
    signature = _hash([parent, _describe_point(point), [_stat(folder, name) for name in SENT]])
    if mark.get("signature") == signature:  # the parent's id in it is of this store
        return ""
    run = point_run(point, _read_mark(folder.parent).get("sweep_id"))
    record = read_record(folder, STAGES if (folder / RUN).exists() else (), run=run)
    record.run = tag_point(run, sweep.name, parent, point.number, point.command)
    line = f"{sweep.name}/{folder.name}: {record.run.run_name}: "
    if deleted_by_hand(store, record.run.fingerprint):
        return line + "deleted in MLflow, not made again (`mlflow runs restore` brings it back)"
    ended = record.ended_at
    if point.state != "finished":
        record.ended_at = None  # how it ended is said below
        record.tags["failure" if point.state == "failed" else "stopped"] = point.reason or str(point.state)
    changes = push(store, record)
    _end_point(store, changes.run_id, point, ended)
    before = mark["run_id"] if mark.get("stand_in") else changes.run_id  # of settings that could not be, until now
    if before != changes.run_id and start_time(store, before) is not None:
        store.client.delete_run(before)
    stand_in = point.fingerprint is None and not (folder / RUN).exists()
    write_json(folder / MARK, {"run_id": changes.run_id, "signature": signature, "stand_in": stand_in})
    return "; ".join([f"{line}{changes}", *record.left_out])


def _end_point(store: Store, run_id: str, point: Point, ended: int | None) -> None:
    run = store.client.get_run(run_id)
    if point.state == "finished":
        for tag in {"failure", "stopped"} & run.data.tags.keys():  # of an earlier attempt
            store.client.delete_tag(run_id, tag)
    elif MEASURED not in run.data.metrics:  # the same adapter may be whole in another sweep
        moment = ended or int((point.folder / POINT).stat().st_mtime * 1000)
        _set_status(store, run_id, str(point.state), moment)


def _set_status(store: Store, run_id: str, state: str, ended: int | None) -> None:
    status = STATUS[state]
    if status == "RUNNING":
        store.client.update_run(run_id, status)
    else:
        store.client.set_terminated(run_id, status, ended)


def _describe_point(point: Point) -> dict[str, Any]:
    return {f.name: getattr(point, f.name) for f in dataclasses.fields(point) if f.name not in ("folder", "run_id")}


def _stat(folder: Path, name: str) -> list[tuple[str, int, int]]:
    """Name, size and time of the file or of the folder's files."""
    path = folder / name
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [(p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
