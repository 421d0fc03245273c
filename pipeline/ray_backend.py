"""Jobs as tasks of Ray: on this machine, or on a cluster that `ray start` or a cloud launcher made."""

import contextlib
import functools
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline import remote_worker
from pipeline.errors import ConfigError, PipelineError
from pipeline.gpu_leases import visible_gpus
from pipeline.imports import ROOT
from pipeline.jobs import Job, OnEnd, worker_command
from pipeline.remote_worker import RemoteWorker, describe_end, new_marker, run_worker

logger = logging.getLogger(__name__)
FORWARDED = ("MLFLOW_", "HF_", "DVC_ROOT", "OMP_NUM_THREADS")  # what a machine of the cluster need not have set
OBJECT_STORE_BYTES = 100 * 2**20  # Ray's smallest is 75 MiB, its default a third of the memory; jobs exchange files
WAIT_SECONDS = 1.0


class RayError(PipelineError, RuntimeError):
    """A Ray cluster that cannot be started, joined or used."""


@dataclass(frozen=True)
class RayBackend:
    """Runs jobs as Ray tasks; a job whose machine or Ray process is lost starts again, from its checkpoint.

    Every machine of the cluster needs the project's folder and its Python environment at the same paths as here (a
    network file system). The output of a job is in `worker.log` of its first point's folder.

    Attributes:
        address: None: a cluster of its own on this machine, ended with the sweep. `auto` or `HOST:PORT`: that cluster.
        num_cpus: that one job takes; as many jobs run at once as find room.
        num_gpus: that one job takes: 0 (it sees none), 1 (leased, see pipeline.gpu_leases), or a part of one that it
            shares.
        max_retries: how often a job that was lost starts again.
        stop_seconds: for a job's checkpoint, when the sweep is stopped.
    """

    address: str | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    max_retries: int = 3
    stop_seconds: float = 120.0
    _connection: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.num_cpus > 0 or not 0 <= self.num_gpus <= 1:
            raise ConfigError(
                f"Ray: num_cpus={self.num_cpus:g}, num_gpus={self.num_gpus:g}: a job takes more than 0 CPUs and 0 to 1 "
                "GPU (its points train on one)."
            )

    def run(self, jobs: Sequence[Job], on_end: OnEnd, command: Callable[[Job], list[str]] = worker_command) -> None:
        """See pipeline.jobs.Backend.

        Raises:
            RayError: there is no Ray, no cluster, or no room in its own one for any job.
        """
        if not jobs:
            return
        marker = new_marker(jobs[0].folders[0].parent)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self._run(self._connect(), jobs, on_end, command, marker)
        except BaseException:
            self.close()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
            marker.unlink(missing_ok=True)

    def _run(
        self, ray: ModuleType, jobs: Sequence[Job], on_end: OnEnd, command: Callable[[Job], list[str]], marker: Path
    ) -> None:
        self._check_room(_machines(ray))
        task = ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=0)(run_worker)
        workers = {job: self._worker(command(job), job, marker) for job in jobs}
        waiting = list(jobs)
        tries = dict.fromkeys(jobs, 0)
        pending: dict[Any, Job] = {}
        try:
            while waiting or pending:
                while waiting:
                    job = waiting.pop(0)
                    tries[job] += 1
                    pending[task.options(name=f"points {job.name}").remote(workers[job])] = job
                for ended in ray.wait(list(pending), timeout=WAIT_SECONDS)[0]:
                    job = pending.pop(ended)
                    result = _result(ray, ended)
                    if result is None and tries[job] <= self.max_retries:
                        logger.warning("points %s: the machine or Ray's process was lost; again", job.name)
                        waiting.append(job)
                    elif result is None:
                        on_end(job, f"the machine or Ray's process was lost {tries[job]} times")
                    else:
                        on_end(job, describe_end(result, workers[job].log))
        except BaseException:
            self._stop(ray, list(pending))
            raise

    def expect(self, num_jobs: int) -> None:
        """Nothing: the cluster starts a process when there is a job for it."""

    def close(self) -> None:
        """Leaves the cluster; one of its own ends."""
        self._connection.close()

    def count(self) -> int:
        """Jobs at once: those that the machines have room for now, at least 1."""
        return self._count

    @functools.cached_property
    def _count(self) -> int:
        if self.address is None:
            return max(1, self._room(self._here()))
        return max(1, sum(self._room(machine) for machine in _machines(self._connect())))

    def _here(self) -> dict[str, float]:
        """What a cluster of its own is made of."""
        return {"CPU": len(os.sched_getaffinity(0)), "GPU": len(visible_gpus()) if self.num_gpus else 0}

    def _room(self, machine: dict[str, float]) -> int:
        """Jobs that the machine takes at once."""
        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return min(int(machine.get(kind, 0) / amount + 1e-9) for kind, amount in wanted.items() if amount)

    def _worker(self, command: list[str], job: Job, marker: Path) -> RemoteWorker:
        environment = {k: v for k, v in os.environ.items() if k.startswith(FORWARDED)}
        if self.num_gpus == 0:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        elif self.num_gpus == 1:
            command = [sys.executable, "-m", "pipeline.gpu_leases", *command]
            if self.address is None:  # Ray numbers GPUs, and knows no MIG devices: which one is the lease's choice
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.uuid for gpu in visible_gpus())
        log = job.folders[0] / "worker.log"
        return RemoteWorker(command, ROOT, log, marker, environment, self.stop_seconds, requeued=False)

    def _connect(self) -> ModuleType:
        """Ray, connected until `close`: a search runs its points in many turns."""
        ray = _import_ray()
        if not ray.is_initialized():
            self._connection.enter_context(self._cluster(ray))
        return ray

    @contextlib.contextmanager
    def _cluster(self, ray: ModuleType) -> Iterator[None]:
        """Ray is connected while inside; the handler of SIGTERM that it replaces is put back."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        settings: dict[str, Any] = {"address": self.address}
        folder = None
        if self.address is None:
            here = self._here()
            self._check_room([here])
            folder = tempfile.mkdtemp(prefix="ray-")
            settings = {
                "address": "local", "num_cpus": here["CPU"], "num_gpus": here["GPU"], "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_temp_dir": folder,
                "_system_config": {"memory_monitor_refresh_ms": 0},  # it kills and retries what never fits
            }  # fmt: skip
        before = signal.getsignal(signal.SIGTERM)
        try:
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
            except Exception as error:  # of many kinds, by what is wrong
                where = "a cluster on this machine" if self.address is None else f"the cluster at {self.address}"
                raise RayError(
                    f"Ray cannot use {where}: {error}. Look at hydra.launcher.address: null starts one here, "
                    "`auto` joins the one that this machine belongs to (`ray status`)."
                ) from None
            finally:
                signal.signal(signal.SIGTERM, before)
            yield
        finally:
            ray.shutdown()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)  # a log may still be written

    def _check_room(self, machines: list[dict[str, float]]) -> None:
        """Ray would wait without end, and say nothing, for a machine that can take a job."""
        if any(self._room(machine) for machine in machines):
            return
        known = "; ".join(f"{m.get('CPU', 0):g} CPUs and {m.get('GPU', 0):g} GPUs" for m in machines)
        text = f"a job takes {self.num_cpus:g} CPUs and {self.num_gpus:g} GPUs, and no machine has them ({known})"
        if self.address is None:
            raise RayError(f"Ray: {text}. Lower hydra.launcher.num_cpus or num_gpus.")
        logger.warning("Ray: %s: waiting for one that has", text)  # an autoscaler may add it

    def _stop(self, ray: ModuleType, pending: list[Any]) -> None:
        """Cancels tasks: one that waits never starts, one that runs gets KeyboardInterrupt, and ends its process."""
        for task in pending:
            ray.cancel(task)
        if pending:
            ray.wait(pending, num_returns=len(pending), timeout=self.stop_seconds + 10 * WAIT_SECONDS)


def _machines(ray: ModuleType) -> list[dict[str, float]]:
    """What each has in all, by kind of resource."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _result(ray: ModuleType, ended: Any) -> int | str | None:
    """What RemoteWorker gives back; None: lost with its machine or Ray's process."""
    try:
        return ray.get(ended)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError):
        return None
    except ray.exceptions.RayError as error:
        return f"Ray: {str(error).strip().splitlines()[-1]}"


def _import_ray() -> ModuleType:
    try:
        import ray
    except ModuleNotFoundError:
        raise RayError(
            "hydra/launcher=ray needs Ray, which is not installed: pip install -c constraints.txt -e '.[ray]'"
        ) from None
    ray.cloudpickle.register_pickle_by_value(remote_worker)
    return ray
