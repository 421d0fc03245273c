"""Curves and system metrics while training runs. Never stops or slows a step: one daemon thread does the talking."""

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import psutil

from pipeline.errors import TrackingError
from pipeline.files import write_text
from pipeline.tracking_push import Changes, check_fingerprint, ensure_run, push_points, push_settings
from pipeline.tracking_records import Point, Record
from pipeline.tracking_runs import RunRecord
from pipeline.tracking_store import Store, open_store, store_lock, store_uri, unusable

logger = logging.getLogger(__name__)
SEND_SECONDS = 1.0
SAMPLE_SECONDS = 5.0  # MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL overrides
CLOSE_SECONDS = 15.0
RETRY_SECONDS = 5.0  # the pause after a failure; doubled by each further one
MAX_RETRY_SECONDS = 60.0
_warned: set[str] = set()


class LiveRun:
    """The open MLflow run of a training; every method returns at once, whatever the store does.

    While the store fails, points wait, and it is tried again after 5, 10, 20, ... 60 seconds.

    Attributes:
        run_id: in the store, known soon after the start; None while or where there is none.
    """

    def __init__(self, run: RunRecord, enabled: bool, system_metrics: bool):
        self.run_id: str | None = None
        self._run = run
        self._system_metrics = system_metrics
        self._points: queue.SimpleQueue[Point] = queue.SimpleQueue()
        self._waiting: list[Point] = []  # taken from the queue, not known to be in the store
        self._store: Store | None = None
        self._known: dict[str, set[int]] = {}
        self._pause = 0.0  # seconds; above 0 while the store fails
        self._retry_at = 0.0
        self._samples: list[dict[str, float]] = []
        self._stop = threading.Event()
        self._closed = False
        self._end_status: str | None = None
        self._status = "RUNNING"
        self._training = False  # the first event makes it true: a result taken from the store logs nothing here
        self._thread: threading.Thread | None = None
        if enabled:
            self._started = (run.started_at or time.time() * 1000) / 1000
            logging.getLogger("urllib3.connectionpool").addFilter(_not_of_tracking)  # it warns of its own retries
            self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
            self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues one event of the curves (`train.loss`, `validation.loss`)."""
        if self._thread is not None:
            now = int(time.time() * 1000)
            for key, value in metrics.items():
                self._points.put(Point(key, step, float(value), now))

    def close(self, status: str | None = None, system_file: Path | None = None) -> str | None:
        """Sends what is queued, for CLOSE_SECONDS at most, and returns the run id if the store gave one.

        Args:
            status: FAILED or KILLED where the training did not end well; a good end is recorded by the train stage.
            system_file: where the system metrics go (`reports/train/system.jsonl`), so that they are in the record.
        """
        if self._thread is None:
            return None
        self._end_status = status
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)
        self._closed = True
        if system_file is not None and self._samples:
            old = system_file.read_text(encoding="utf-8") if system_file.exists() else ""
            write_text(system_file, old + "".join(json.dumps(sample) + "\n" for sample in list(self._samples)))
        return self.run_id

    def __enter__(self) -> "LiveRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self._stop.is_set():
            stopped = issubclass(kind, KeyboardInterrupt) or not issubclass(kind, Exception)
            self.close("KILLED" if stopped else "FAILED")

    def _work(self) -> None:
        self._send()
        interval = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or SAMPLE_SECONDS)
        next_sample = time.monotonic() + min(interval, SEND_SECONDS)
        psutil.cpu_percent()  # the first answer is always 0
        while True:
            last = self._stop.wait(SEND_SECONDS)
            points = self._drain()
            self._training |= bool(points)
            if self._training and self._system_metrics and (last or time.monotonic() >= next_sample):
                next_sample = time.monotonic() + interval
                points += self._sample()
            self._waiting += points
            late = last and self._pause > RETRY_SECONDS  # what failed a moment ago is not tried again for a close
            if late or time.monotonic() >= self._retry_at:
                self._send(self._end_status)
            if last:
                break

    def _send(self, end_status: str | None = None) -> None:
        """Sends what waits, or keeps it for the next attempt: tracking never stops a training."""
        try:
            if self._store is None:
                self._store = self._open()
            num_sent = self._push(self._store) if self._waiting else 0
            if end_status is not None:
                self._store.client.set_terminated(self.run_id, end_status)
        except Exception as error:  # whatever MLflow or its database raises
            if not self._pause:
                warn_once(error, "Training goes on; its record is sent or kept when it ends.")
            self._store, self._known = None, {}  # some of it may have arrived: the store's own history will tell
            self._pause = min(self._pause * 2 or RETRY_SECONDS, MAX_RETRY_SECONDS)
            self._retry_at = time.monotonic() + self._pause
            return
        if self._pause:
            logger.info("tracking is back; %d points were sent", num_sent)
        self._pause = 0.0

    def _open(self) -> Store:
        check_fingerprint(self._run.fingerprint)
        store = open_store()
        created = False
        if self.run_id is None:  # a run deleted by hand in the meantime is not made again
            self.run_id, created = ensure_run(store, self._run)
        run = store.client.get_run(self.run_id)
        push_settings(store, run, Record(self._run), Changes(self.run_id, created))
        self._status = run.info.status
        return store

    def _push(self, store: Store) -> int:
        with store_lock(self._run.fingerprint[:16]):
            if self._closed:  # a call outlived `close`: by now the stage's record says it all
                return 0
            if self._status != "RUNNING":  # an earlier attempt failed or was ended; this one goes on
                store.client.update_run(self.run_id, "RUNNING")
                self._status = "RUNNING"
            num_sent = push_points(store, self.run_id or "", self._waiting, self._known)
        self._waiting = []
        return num_sent

    def _drain(self) -> list[Point]:
        points = []
        while not self._points.empty():
            points.append(self._points.get())
        return points

    def _sample(self) -> list[Point]:
        now = time.time()
        step = int(now - self._started)
        values = sample_system()
        self._samples.append({"step": step, "timestamp": int(now * 1000), **values})
        return [Point(key, step, value, int(now * 1000)) for key, value in values.items()]


def sample_system() -> dict[str, float]:
    """CPU, memory and the visible GPUs now, under the names that MLflow's system metrics page knows."""
    memory = psutil.virtual_memory()
    values = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/process_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
    }
    for index, device in enumerate(visible_gpus()):
        values |= {f"system/gpu_{index}_{name}": value for name, value in _sample_gpu(device).items()}
    return values


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that this process can use (MLflow's own sampling reports every GPU of the machine)."""
    torch = sys.modules.get("torch")  # never the first to import it, nor to start CUDA
    if torch is None or not torch.cuda.is_initialized():
        return []
    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]


def _sample_gpu(device: str) -> dict[str, float]:
    names = {
        "utilization.gpu": "utilization_percentage",
        "memory.used": "memory_usage_megabytes",
        "power.draw": "power_usage_watts",
    }
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "-i", device]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
        values = [float(value) for value in answer.strip().split(",")]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        warn_once(error, "GPU metrics are left out.")
        return {}
    values[1] *= 1.048576  # nvidia-smi counts in MiB
    return dict(zip(names.values(), values, strict=True))


def _not_of_tracking(record: logging.LogRecord) -> bool:
    return not (record.threadName or "").startswith("tracking")


def warn_once(error: Exception, consequence: str) -> None:
    """One warning a process and kind of consequence; the rest is for `--verbose` eyes."""
    text = str(error if isinstance(error, TrackingError) else unusable(store_uri(), error))
    level = logging.INFO if consequence in _warned else logging.WARNING
    _warned.add(consequence)
    logger.log(level, "%s %s", text, consequence)
