"""Makes one MLflow run equal to its record: adds what is missing, repeats nothing, takes nothing away."""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import TrackingError
from pipeline.files import hash_file, hash_path, read_json, write_text
from pipeline.tracking_records import Point, Record
from pipeline.tracking_runs import PARENT, RunRecord, format_value
from pipeline.tracking_store import Store, patience, store_lock, unrepeated

MAX_PARAM_CHARACTERS = 6000  # MLflow's limits
MAX_TAG_CHARACTERS = 5000
MAX_MODEL_PARAM_CHARACTERS = 500
PARAMS_A_BATCH = 100
POINTS_A_BATCH = 1000
MAX_UPLOAD_BYTES = 2 * 2**30  # a larger adapter (method full) stays in DVC's cache, and the run says so
SWEEP_TAGS = (PARENT, "sweep", "point", "command")  # of the newest sweep that has the adapter
MODEL_NAME = "adapter"
MANIFEST = "config/manifest.json"


@dataclass
class Changes:
    """What a push added, in numbers."""

    run_id: str = ""
    created: bool = False
    params: int = 0
    tags: int = 0
    points: int = 0
    inputs: int = 0
    files: int = 0

    def __str__(self) -> str:
        names = ("params", "tags", "points", "inputs", "files")
        counts = ", ".join(f"{count} {name}" for name in names if (count := getattr(self, name)))
        if self.created:
            return f"new run: {counts}"
        return f"added {counts}" if counts else "up to date"


def find_run(store: Store, fingerprint: str, deleted: bool = False) -> Any:
    """The oldest run with this fingerprint, or None."""
    from mlflow.entities import ViewType

    view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    query = f"tags.fingerprint = '{fingerprint}'"
    found = store.client.search_runs([store.experiment_id], query, view, 1, ["attributes.start_time ASC"])
    return found[0] if found else None


def start_time(store: Store, run_id: str) -> int | None:
    """Milliseconds since 1970; None of a run that is deleted or of another store."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        info = store.client.get_run(run_id).info
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return None
    return int(info.start_time) if info.lifecycle_stage == "active" else None


def ensure_run(store: Store, run: RunRecord) -> tuple[str, bool]:
    """Run id of the fingerprint, made where the store has none, and whether it was made."""
    with store_lock():
        found = find_run(store, run.fingerprint)
        if found is not None:
            return found.info.run_id, False
        tags = {key: _cut(value, MAX_TAG_CHARACTERS) for key, value in run.tags.items()}
        tags["fingerprint"] = run.fingerprint
        started = run.started_at or int(time.time() * 1000)
        with unrepeated():
            made = store.client.create_run(store.experiment_id, started, tags, run.run_name)
        return made.info.run_id, True


def push(store: Store, record: Record) -> Changes:
    """Brings the run up to its record and says what was missing.

    Raises:
        MlflowException, OSError: the store fails half-way; pushing again goes on from there.
    """
    check_fingerprint(record.run.fingerprint)
    with store_lock(record.run.fingerprint[:16]):
        run_id, created = ensure_run(store, record.run)
        changes = Changes(run_id, created)
        run = store.client.get_run(run_id)
        push_settings(store, run, record, changes)
        _push_values(store, run, record, changes)
        changes.points += push_points(store, run_id, record.points)
        changes.files += _push_artifacts(store, run_id, record)
        if record.adapter is not None:
            changes.files += _push_model(store, run, record)
        if record.ended_at is not None and run.info.status != "FINISHED":
            store.client.set_terminated(run_id, "FINISHED", record.ended_at)
    return changes


def push_settings(store: Store, run: Any, record: Record, changes: Changes) -> None:
    """Params, tags and data sets. A param never changes: another value is kept as the tag `also.<param>`."""
    from mlflow.entities import Param, RunTag

    run_id = run.info.run_id
    wanted = {key: _cut(format_value(value), MAX_PARAM_CHARACTERS) for key, value in record.run.params.items()}
    params = [Param(key, value) for key, value in wanted.items() if key not in run.data.params]
    tags = record.run.tags | record.tags
    tags |= {f"also.{key}": value for key, value in wanted.items() if run.data.params.get(key, value) != value}
    for key in {"dvc_experiment", "sweeps"} & tags.keys():  # one adapter may serve several
        names = [*run.data.tags.get(key, "").split(", "), tags[key]]
        tags[key] = ", ".join(sorted({name for name in names if name}))
    if _is_of_newer_sweep(store, run, tags):
        tags = {key: value for key, value in tags.items() if key not in SWEEP_TAGS}
    tags = {key: _cut(value, MAX_TAG_CHARACTERS) for key, value in tags.items()}
    changed = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
    for some_params in _batches(params, PARAMS_A_BATCH):
        store.client.log_batch(run_id, params=some_params)
    for some_tags in _batches(changed, PARAMS_A_BATCH):
        store.client.log_batch(run_id, tags=some_tags)
    changes.params += len(params)
    changes.tags += 0 if changes.created else len(changed)
    changes.inputs += _push_inputs(store, run, record.run)


def _is_of_newer_sweep(store: Store, run: Any, tags: dict[str, str]) -> bool:
    """Whether the run's parent started after the one that the tags name, or they name a sweep without one."""
    theirs, ours = run.data.tags.get(PARENT), tags.get(PARENT)
    if theirs is None or theirs == ours or "sweep" not in tags:
        return False
    started = start_time(store, theirs)
    return started is not None and started > ((ours and start_time(store, ours)) or 0)


def _push_inputs(store: Store, run: Any, record: RunRecord) -> int:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    known = {(each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs}
    missing = [
        DatasetInput(
            Dataset(
                name=each["name"],
                digest=each["digest"],
                source_type="local",
                source=json.dumps({"uri": each["source"]}),
                profile=json.dumps({"num_rows": each["num_rows"]}),
            ),
            [InputTag("mlflow.data.context", each["context"])],
        )
        for each in record.datasets
        if (each["name"], each["digest"]) not in known
    ]
    if missing:
        store.client.log_inputs(run.info.run_id, missing)
    return len(missing)


def _push_values(store: Store, run: Any, record: Record, changes: Changes) -> None:
    """Single numbers; a new value of one becomes its latest."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    changed = [Metric(key, value, now, 0) for key, value in record.values.items() if run.data.metrics.get(key) != value]
    for some in _batches(changed, POINTS_A_BATCH):
        store.client.log_batch(run.info.run_id, metrics=some)
    changes.points += len(changed)


def push_points(store: Store, run_id: str, points: Sequence[Point], known: dict[str, set[int]] | None = None) -> int:
    """Logs the points whose step the curve does not have yet.

    Args:
        known: steps by key, filled in here, for a caller that comes again and again.
    """
    from mlflow.entities import Metric

    known = {} if known is None else known
    for key in {point.key for point in points} - known.keys():
        known[key] = {metric.step for metric in store.client.get_metric_history(run_id, key)}
    missing = []
    for point in points:
        if point.step not in known[point.key]:
            known[point.key].add(point.step)
            missing.append(Metric(point.key, point.value, point.timestamp, point.step))
    for some in _batches(missing, POINTS_A_BATCH):
        store.client.log_batch(run_id, metrics=some)
    return len(missing)


def _push_artifacts(store: Store, run_id: str, record: Record) -> int:
    """Files of the run whose size or hash differs from what is stored, then the manifest of hashes."""
    hashes = {name: hash_file(path) for name, path in record.artifacts.items()}
    hashes |= {name: hashlib.sha256(text.encode()).hexdigest() for name, text in record.texts.items()}
    sizes = {name: path.stat().st_size for name, path in record.artifacts.items()}
    sizes |= {name: len(text.encode()) for name, text in record.texts.items()}
    folders = {name.rpartition("/")[0] for name in hashes} | {MANIFEST.rpartition("/")[0]}
    stored = {file.path: file.file_size for folder in folders for file in store.client.list_artifacts(run_id, folder)}
    with tempfile.TemporaryDirectory() as temporary:
        before: dict[str, str] = {}
        if MANIFEST in stored:
            before = read_json(Path(store.client.download_artifacts(run_id, MANIFEST, temporary)))
        stale = [name for name in hashes if stored.get(name) != sizes[name] or before.get(name) != hashes[name]]
        if not stale:
            return 0
        for name in stale:
            local = record.artifacts.get(name)
            if local is None:
                local = Path(temporary) / "texts" / name
                write_text(local, record.texts[name])
            _upload(store, run_id, local, name)
        manifest = Path(temporary) / "texts" / MANIFEST
        write_text(manifest, json.dumps(before | hashes, indent=2, sort_keys=True) + "\n")
        _upload(store, run_id, manifest, MANIFEST)
    return len(stale)


def _upload(store: Store, run_id: str, local: Path, name: str) -> None:
    with patience(local.stat().st_size):
        store.client.log_artifact(run_id, str(local), name.rpartition("/")[0] or None)


def _push_model(store: Store, run: Any, record: Record) -> int:
    """The adapter as the run's model: its files once, as they are, linked as the run's output."""
    from mlflow.entities import LoggedModelOutput

    client, run_id, folder = store.client, run.info.run_id, record.adapter
    assert folder is not None
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    digest = hash_path(folder)
    models = client.search_logged_models([store.experiment_id], f"source_run_id = '{run_id}'", max_results=1)
    if models:
        model = client.get_logged_model(models[0].model_id)
    else:
        chosen = {key: value for key, value in record.run.params.items() if key.startswith(("lora.", "model."))}
        kind = "full model" if record.run.params.get("train.method") == "full" else "LoRA adapter"
        params = {key: _cut(format_value(value), MAX_MODEL_PARAM_CHARACTERS) for key, value in chosen.items()}
        with unrepeated():
            model = client.create_logged_model(store.experiment_id, MODEL_NAME, run_id, {}, params, kind)
    uploaded = 0
    if sum(files.values()) > MAX_UPLOAD_BYTES:
        gigabytes = f"{sum(files.values()) / 2**30:.1f} GiB is over {MAX_UPLOAD_BYTES / 2**30:.0f} GiB"
        _tag_model(client, model, {"sha256": digest, "files": f"not uploaded ({gigabytes}); `dvc pull models/adapter`"})
    elif model.tags.get("sha256") != digest or dict(_list_model(client, model.model_id)) != files:
        with patience(sum(files.values())):
            client.log_model_artifacts(model.model_id, str(folder))
        _tag_model(client, model, {"sha256": digest})
        uploaded = len(files)
    if str(model.status) != "READY":
        client.finalize_logged_model(model.model_id, "READY")
    if model.model_id not in {each.model_id for each in run.outputs.model_outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return uploaded


def _tag_model(client: Any, model: Any, tags: dict[str, str]) -> None:
    if any(model.tags.get(key) != value for key, value in tags.items()):
        client.set_logged_model_tags(model.model_id, tags)


def _list_model(client: Any, model_id: str, path: str | None = None) -> Iterator[tuple[str, int]]:
    for file in client.list_logged_model_artifacts(model_id, path):
        if file.is_dir:
            yield from _list_model(client, model_id, file.path)
        else:
            yield file.path, file.file_size


def deleted_by_hand(store: Store, fingerprint: str) -> bool:
    """Whether somebody deleted the run in MLflow and no other has taken its place."""
    return find_run(store, fingerprint) is None and find_run(store, fingerprint, deleted=True) is not None


def _cut(text: str, limit: int) -> str:
    """The text, or its beginning and its hash where it is over the limit."""
    if len(text) <= limit:
        return text
    mark = f"... sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return text[: limit - len(mark)] + mark


def _batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def check_fingerprint(fingerprint: str) -> None:
    """Raises: TrackingError: it could not stand in a query."""
    if not fingerprint.isalnum():
        raise TrackingError(f"models/run.json: fingerprint {fingerprint!r} is not hex. Run `dvc repro --force train`.")
