"""Jobs of a sweep as a Slurm job array, by submitit."""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline import remote_worker
from pipeline.errors import ConfigError, PipelineError
from pipeline.imports import ROOT
from pipeline.jobs import Job, OnEnd, worker_command
from pipeline.remote_worker import RemoteWorker, describe_end, new_marker

logger = logging.getLogger(__name__)
CLUSTERS = ("slurm", "local", "debug")
POLL_SECONDS = 1.0
QUEUE_SECONDS = 30.0  # between two looks at Slurm's queue: its controller is everybody's
LOCAL_DELAY_SECONDS = 30  # submitit's, for `local`
SPARE_SECONDS = 15  # of signal_delay_s: for submitit to requeue the job


class SlurmError(PipelineError, RuntimeError):
    """A Slurm that cannot be used."""


@dataclass(frozen=True)
class SlurmBackend:
    """Runs jobs as one Slurm job array; a job that is preempted or runs out of time is requeued, from its checkpoint.

    The compute nodes need the project's folder and its Python environment at the same paths as here (a network file
    system). The output of a job is in `worker.log` of its first point's folder; Slurm's and submitit's own files are
    in `slurm/` of the sweep's folder. Runs where jobs are submitted: a login node, best inside tmux.

    Attributes:
        partition, account, qos, constraint: of sbatch; None: Slurm's default.
        timeout_min: of one run of a job, in minutes; then it is requeued.
        gpus_per_node: 1, or 0 for a CPU; more where a cluster gives out whole nodes: a job uses one.
        mem_gb: memory of a node, in GB.
        num_workers: so many jobs of the array run at once.
        max_num_timeout: how often a job may run out of time and be requeued. Preemption is not counted.
        signal_delay_s: so many seconds before time runs out a job is told to write its checkpoint.
        setup: shell lines to run on the node first, such as `module load cuda`.
        additional_parameters: other options of sbatch, such as `{"reservation": "x"}`.
        cluster: None or `slurm`; `local`: submitit's processes on this machine, `debug`: in this one, to try without
            Slurm.
    """

    partition: str | None = None
    timeout_min: int = 240
    gpus_per_node: int = 1
    cpus_per_task: int = 4
    mem_gb: float = 32.0
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    num_workers: int = 16
    max_num_timeout: int = 10
    signal_delay_s: int = 90
    setup: list[str] = field(default_factory=list)
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    cluster: str | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be at least {least}"
            for name, least in (
                ("timeout_min", 1),
                ("gpus_per_node", 0),
                ("cpus_per_task", 1),
                ("num_workers", 1),
                ("max_num_timeout", 0),
                ("signal_delay_s", SPARE_SECONDS + 15),
            )
            if getattr(self, name) < least
        ]
        if not self.mem_gb > 0:
            problems.append(f"mem_gb={self.mem_gb:g} must be more than 0")
        if self.signal_delay_s >= 60 * self.timeout_min:
            problems.append(f"signal_delay_s={self.signal_delay_s} must be less than timeout_min={self.timeout_min}")
        if self.cluster not in (None, *CLUSTERS):
            problems.append(f"cluster={self.cluster!r} must be null, {', '.join(CLUSTERS)}")
        if problems:
            raise ConfigError(f"hydra.launcher of Slurm: {'; '.join(problems)}.")

    def run(self, jobs: Sequence[Job], on_end: OnEnd, command: Callable[[Job], list[str]] = worker_command) -> None:
        """See pipeline.jobs.Backend.

        Raises:
            SlurmError: submitit is not installed, there is no Slurm here, or it refuses the jobs.
        """
        if not jobs:
            return
        sweep = jobs[0].folders[0].parent
        executor = self._executor(sweep / "slurm")
        marker = new_marker(sweep)
        waiting = [(job, self._worker(command(job), job, marker)) for job in jobs]
        running: dict[Any, tuple[Job, RemoteWorker]] = {}
        queue = _Queue()
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while waiting or running:
                room = len(waiting) if self._is_slurm else self.num_workers - len(running)
                if waiting and room:
                    now, waiting = waiting[:room], waiting[room:]
                    running |= zip(_submit(executor, [worker for _, worker in now]), now, strict=True)
                time.sleep(POLL_SECONDS)
                lost = queue.lost({job.job_id for job in running}) if self._is_slurm else set()
                for ended in [job for job in running if self._has_ended(job) or job.job_id in lost]:
                    job, worker = running.pop(ended)
                    on_end(job, _describe(ended, worker, self.cluster == "debug"))
        except BaseException:
            marker.unlink(missing_ok=True)  # a job that is told to end does not wait to be requeued
            self._stop(list(running))
            raise
        finally:
            marker.unlink(missing_ok=True)
            signal.signal(signal.SIGTERM, before)

    def count(self) -> int:
        """Jobs at once."""
        return self.num_workers

    def expect(self, num_jobs: int) -> None:
        """Nothing: the cluster starts a process when there is a job for it."""

    def close(self) -> None:
        """Nothing stays between two runs."""

    @property
    def _is_slurm(self) -> bool:
        return self.cluster in (None, "slurm")

    @property
    def _stop_seconds(self) -> float:
        return (self.signal_delay_s if self._is_slurm else LOCAL_DELAY_SECONDS) - SPARE_SECONDS

    def _executor(self, folder: Path) -> Any:
        submitit = _import_submitit()
        if self._is_slurm and shutil.which("srun") is None:
            raise SlurmError(
                "there is no Slurm here (srun is not on the PATH). Run this on a login node, or try it with processes "
                "on this machine: hydra.launcher.cluster=local."
            )
        cluster = self.cluster or "slurm"
        limits = {} if cluster == "debug" else {f"{cluster}_max_num_timeout": self.max_num_timeout}
        executor = submitit.AutoExecutor(folder, cluster=cluster, **limits)
        executor.update_parameters(
            name=f"sweep-{folder.parent.name}", timeout_min=self.timeout_min, cpus_per_task=self.cpus_per_task,
            gpus_per_node=self.gpus_per_node or None, mem_gb=self.mem_gb, nodes=1, tasks_per_node=1,
            slurm_partition=self.partition, slurm_account=self.account, slurm_qos=self.qos,
            slurm_constraint=self.constraint, slurm_array_parallelism=self.num_workers,
            slurm_signal_delay_s=self.signal_delay_s, slurm_setup=self.setup or None,
            slurm_additional_parameters=self.additional_parameters or None,
            slurm_srun_args=[f"--cpus-per-task={self.cpus_per_task}"],  # since 22.05 srun does not take over sbatch's
        )  # fmt: skip
        return executor

    def _worker(self, command: list[str], job: Job, marker: Path) -> RemoteWorker:
        environment = {} if self.gpus_per_node else {"CUDA_VISIBLE_DEVICES": ""}
        if self.gpus_per_node and not self._is_slurm:  # submitit gives every process the same GPUs
            command = [sys.executable, "-m", "pipeline.gpu_leases", *command]
        log = job.folders[0] / "worker.log"
        requeued = self.cluster != "debug"
        return RemoteWorker(command, ROOT, log, marker, environment, self._stop_seconds, requeued)

    def _has_ended(self, job: Any) -> bool:
        if not self._is_slurm:
            return job.done()
        return job.paths.result_pickle.name in os.listdir(job.paths.folder)  # asks the network file system anew

    def _stop(self, running: list[Any]) -> None:
        """SIGTERM to what runs, which is told on to the jobs' processes; what waits never starts."""
        if self._is_slurm and running:
            subprocess.run(["scancel", *(job.job_id for job in running)], check=False)
        elif self.cluster == "local":
            for job in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(job.job_id), signal.SIGTERM)
        deadline = time.monotonic() + self._stop_seconds + SPARE_SECONDS
        while running and self.cluster != "debug" and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            queued = _queued() if self._is_slurm else None
            running = [job for job in running if not self._has_ended(job) and (queued is None or job.job_id in queued)]


class _Queue:
    """Finds jobs that Slurm no longer knows: absent in two looks, one after the other."""

    def __init__(self) -> None:
        self._looked = time.monotonic()
        self._absent: set[str] = set()

    def lost(self, running: set[str]) -> set[str]:
        if time.monotonic() - self._looked < QUEUE_SECONDS:
            return set()
        self._looked = time.monotonic()
        queued = _queued()
        absent = set() if queued is None else running - queued
        lost, self._absent = absent & self._absent, absent
        return lost


def _queued() -> set[str] | None:
    """Ids of this user's jobs that wait or run; None: Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        logger.warning("squeue: %s; asking again", done.stderr.strip())
        return None
    return set(done.stdout.split())


def _submit(executor: Any, workers: list[RemoteWorker]) -> list[Any]:
    """submitit's jobs; several become a job array. Ctrl-C is for the head alone, which then tells them."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit_array(workers) if len(workers) > 1 else [executor.submit(workers[0])]
    except (RuntimeError, subprocess.CalledProcessError) as error:  # submitit's are RuntimeErrors
        raise SlurmError(f"sbatch refused the jobs: {str(error).strip()}. Look at hydra.launcher's settings.") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _describe(ended: Any, worker: RemoteWorker, in_process: bool) -> str | None:
    """What became of a job, in words; None: it ended well."""
    paths = ended.paths
    if not in_process and not paths.result_pickle.exists():  # submitit would wait for it without end
        return f"job {ended.job_id} ended with no result: cancelled, killed, or its node lost; see {paths.stderr}"
    try:
        return describe_end(ended.result(), worker.log)
    except Exception as error:  # submitit's, with a traceback inside
        last = str(error).split("\n----------------------\nYou can")[0].splitlines()[-1]
        return f"job {ended.job_id}: {last}; see {paths.stderr}"


def _import_submitit() -> ModuleType:
    try:
        import cloudpickle
        import submitit
    except ModuleNotFoundError:
        raise SlurmError(
            "hydra/launcher=slurm needs submitit, which is not installed: pip install -c constraints.txt -e '.[slurm]'"
        ) from None
    cloudpickle.register_pickle_by_value(remote_worker)
    return submitit
