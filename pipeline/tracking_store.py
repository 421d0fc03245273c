"""The MLflow store: which one, made once and safely, found out quickly when it is out of reach.

Nothing here uses MLflow's global state; `import mlflow` (2 to 3 s) happens in `open_store`.
"""

import contextlib
import fcntl
import logging
import os
import socket
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

from pipeline.errors import TrackingError
from pipeline.tracking_view import experiment_tags
from pipeline.workspace import ADAPTER, project_root

logger = logging.getLogger(__name__)
T = TypeVar("T")
PROBE_SECONDS = 3
LOCK_SECONDS = 120
PUSH_SECONDS = 60.0  # a stage waits no longer for its record to be sent, a second a megabyte of adapter added
ENVIRONMENT = {  # of this process; what the user has set stands
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # MLflow's own: 7 with backoff, four minutes against a dead server
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@dataclass
class Store:
    """An open store: `client` is a `mlflow.tracking.MlflowClient`."""

    client: Any
    uri: str
    experiment_id: str


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, else `mlflow.db` of the project; a relative sqlite path is the project's too."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = sqlite_path(uri)
    return uri if path is None or path.is_absolute() else f"sqlite:///{project_root() / path}"


def sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///").split("?")[0]) if uri.startswith("sqlite:///") else None


def redact(uri: str) -> str:
    """The address without user and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else uri


def experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or project_root().name


def set_environment() -> None:
    """Before MLflow is imported: short timeouts and no telemetry in this process."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def open_store() -> Store:
    """Opens the store and the project's experiment, and makes both where they are missing.

    Raises:
        TrackingError: the store is out of reach or cannot be used; within a few seconds.
    """
    set_environment()
    uri = store_uri()
    probe(uri)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        with store_lock():
            path = sqlite_path(uri)
            if path is not None:
                _make_sqlite(path)
            client = MlflowClient(uri)
            return Store(client, uri, _experiment(client, uri))
    except (MlflowException, OSError) as error:
        raise unusable(uri, error) from error


def unusable(uri: str, error: Exception) -> TrackingError:
    """The error in one line, without the user and password that MLflow's own texts repeat with the address."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    user = urlsplit(uri).netloc.rpartition("@")[0]
    password = user.partition(":")[2]
    for secret in (f"{user}@", password):
        first_line = first_line.replace(secret, "") if secret.strip("@") else first_line
    return TrackingError(f"MLflow at {redact(uri)}: {first_line[:300]}{' ...' if len(first_line) > 300 else ''}")


def probe(uri: str) -> None:
    """Raises: TrackingError: nobody answers at the address within PROBE_SECONDS."""
    parts = urlsplit(uri)
    if not parts.hostname or parts.scheme.startswith("databricks"):
        return
    try:
        if parts.scheme in ("http", "https"):
            urllib.request.urlopen(f"{redact(uri).rstrip('/')}/health", timeout=PROBE_SECONDS).close()
        elif parts.port:
            socket.create_connection((parts.hostname, parts.port), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # somebody answers; what MLflow may do there, MLflow will say
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise TrackingError(
            f"MLFLOW_TRACKING_URI: no answer from {redact(uri)} within {PROBE_SECONDS} s ({reason}). "
            "Start the server, or unset the variable to use mlflow.db in the project."
        ) from None


def import_mlflow() -> None:
    """In the caller's thread: importing in another one beside it can deadlock. 2 to 3 s the first time."""
    import pipeline.tracking_push  # noqa: F401

    set_environment()
    import mlflow.tracking

    if sqlite_path(store_uri()) is not None:
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def push_seconds(*folders: Path | None) -> float:
    """How long a push of these folders' adapters may take."""
    files = [p for folder in folders if folder for p in (folder / ADAPTER).rglob("*") if p.is_file()]
    return PUSH_SECONDS + sum(p.stat().st_size for p in files) / 2**20


def within(seconds: float, action: Callable[[], T]) -> T:
    """The action's result or error.

    Raises:
        TrackingError: it takes longer; it goes on in a daemon thread.
    """
    outcome: list[tuple[T | None, Exception | None]] = []

    def work() -> None:
        try:
            outcome.append((action(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, name="tracking-push", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TrackingError(f"MLflow at {redact(store_uri())}: not done after {seconds:.0f} s.")
    result, error = outcome[0]
    if error is not None:
        raise error
    return cast(T, result)


@contextlib.contextmanager
def patience(num_bytes: int) -> Iterator[None]:
    """Lets the store's answer to an upload take a second a megabyte longer (it may pass it on to object storage)."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    with _environment(name, str(int(os.environ[name]) + num_bytes // 2**20)):
        yield


@contextlib.contextmanager
def unrepeated() -> Iterator[None]:
    """No retry by MLflow of a call that creates: a server that answers too late has done it, and would do it twice."""
    with _environment("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"):
        yield


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ[name]
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ[name] = before


def outbox() -> Path:
    """Where records wait that could not be sent; the locks are in `.locks` there."""
    return project_root() / ".training" / "outbox"


@contextlib.contextmanager
def store_lock(name: str = "store") -> Iterator[None]:
    """One process of this project at a time: a fresh store is made once, an adapter gets one run and no point twice.

    Raises:
        TrackingError: another process holds it for LOCK_SECONDS.
    """
    path = outbox() / ".locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TrackingError(f"{path}: another process holds it. Is one hanging?") from None
                time.sleep(0.05)
        yield  # closing the file gives the lock back, also when the process is killed


def _make_sqlite(path: Path) -> None:
    """Makes the database under another name first: one that was killed half-way is never opened.

    Call it with the store's lock. About 8 s, once (MLflow runs all its migrations).
    """
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    logger.info("making the MLflow store %s (once, some seconds)", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    migrations = logging.getLogger("mlflow.store.db.utils")
    level = migrations.level
    migrations.setLevel(logging.WARNING)
    try:
        SqlAlchemyStore(f"sqlite:///{unfinished}", (path.parent / "mlartifacts").as_uri()).engine.dispose()
    finally:
        migrations.setLevel(level)
    unfinished.replace(path)


def _experiment(client: Any, uri: str) -> str:
    name = experiment_name()
    path = sqlite_path(uri)
    location = None
    if urlsplit(uri).scheme not in ("http", "https", "databricks"):
        location = ((path.parent if path else project_root()) / "mlartifacts").as_uri()
    found = client.get_experiment_by_name(name)
    if found is None:
        return client.create_experiment(name, artifact_location=location, tags=experiment_tags())
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow experiment '{name}' is deleted. Restore it "
            f"(`mlflow experiments restore -x {found.experiment_id}`) or name another one in MLFLOW_EXPERIMENT_NAME."
        )
    for key, value in experiment_tags().items():  # an older version's view
        if found.tags.get(key) != value:
            client.set_experiment_tag(found.experiment_id, key, value)
    if path is not None and "MLFLOW_TRACKING_URI" not in os.environ and found.artifact_location != location:
        _move_artifacts(path, found.artifact_location, str(location))
    return found.experiment_id


def _move_artifacts(path: Path, old: str, new: str) -> None:
    """The project folder was moved or copied: MLflow's absolute artifact paths follow it."""
    logger.info("mlflow.db: the project moved from %s to %s; artifact paths follow", old, new)
    columns = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as database, database:
        for table, column in columns.items():
            moved = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, ?) = ?"
            database.execute(moved, (new, len(old) + 1, len(old) + 1, old + "/"))
