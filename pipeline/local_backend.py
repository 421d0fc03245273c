"""Jobs on this machine: worker processes that stay, one a GPU, or a number of them on the CPU."""

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.errors import ConfigError
from pipeline.gpu_leases import Gpu, LeaseError, lease, visible_gpus
from pipeline.imports import ROOT
from pipeline.jobs import Job, OnEnd, describe_exit
from pipeline.parents import this_process

logger = logging.getLogger(__name__)
END_SECONDS = 60.0  # for a process that has nothing to do any more
POLL_SECONDS = 0.5
LEASE_SECONDS = 5.0  # between two looks at whether there is work left


@dataclass
class _Lane:
    """One worker at a time, and the GPU that it has."""

    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    environment: dict[str, str] | None = None
    descriptors: list[int] = field(default_factory=list)
    worker: subprocess.Popen | None = None
    has_worked: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass
class LocalBackend:
    """Runs jobs in worker processes that are started once, as their imports take seconds, and end with `close`.

    Attributes:
        num_workers: processes at once; None: one a GPU that this process sees, else one.
        num_threads: CPU threads of each; None: torch's own choice.
        on_cpu: no GPU is used.
    """

    num_workers: int | None = None
    num_threads: int | None = None
    on_cpu: bool = False
    _waiting: "queue.SimpleQueue[Job]" = field(default_factory=queue.SimpleQueue, init=False)
    _lanes: list[_Lane] = field(default_factory=list, init=False)
    _stopped: threading.Event = field(default_factory=threading.Event, init=False)
    _errors: list[Exception] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        for name in ("num_workers", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"hydra.launcher.{name}: {value} must be 1 or more, or null.")

    def gpus(self) -> list[Gpu]:
        return [] if self.on_cpu else visible_gpus()

    def count(self) -> int:
        """Workers at once."""
        num_gpus = len(self.gpus())
        return min(self.num_workers or num_gpus, num_gpus) if num_gpus else self.num_workers or 1

    def expect(self, num_jobs: int) -> None:
        """Starts workers on the CPU, whose imports take as long as what the head does before it has jobs for them.

        Those for GPUs wait for their lease.
        """
        if self._lanes or self.gpus():
            return
        self._lanes = [_Lane() for _ in range(min(self.count(), num_jobs))]
        for lane in self._lanes:
            self._open(lane)
            lane.worker = self._start(lane)

    def run(self, jobs: Sequence[Job], on_end: OnEnd) -> None:
        """See `pipeline.jobs.Backend`."""
        for job in jobs:
            self._waiting.put(job)
        number = min(self.count(), len(jobs))
        self._lanes += [_Lane() for _ in range(number - len(self._lanes))]
        lanes = self._lanes[:number]
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for lane in lanes:
                lane.ended.clear()
                threading.Thread(target=self._work, args=(lane, on_end), daemon=True).start()
            for lane in lanes:  # no join: Ctrl-C in one has Python 3.11 believe that the thread is over
                while not lane.ended.wait(POLL_SECONDS):  # one without end would hold Ctrl-C back
                    pass
        except KeyboardInterrupt:
            self._stop()
            for lane in lanes:  # for as long as a step and a checkpoint take; a second Ctrl-C ends it
                while not lane.ended.wait(POLL_SECONDS):
                    pass
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
        if self._errors:
            raise self._errors[0]

    def close(self) -> None:
        """Ends the workers and gives their GPUs back."""
        for lane in self._lanes:
            if lane.worker is not None:
                assert lane.worker.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    lane.worker.stdin.close()
                if not lane.has_worked:  # it may be in the middle of its imports
                    lane.worker.terminate()
        for lane in self._lanes:
            if lane.worker is not None:
                try:
                    lane.worker.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    lane.worker.kill()
            lane.stack.close()
        self._lanes.clear()

    def _stop(self) -> None:
        self._stopped.set()
        workers = [lane.worker for lane in self._lanes if lane.worker is not None]
        num_busy = sum(lane.has_worked for lane in self._lanes)
        logger.info("stopping: %d processes write their checkpoints", num_busy)
        for worker in workers:
            worker.terminate()

    def _work(self, lane: _Lane, on_end: OnEnd) -> None:
        """Gives jobs to the lane's worker until none waits; one that dies takes only its job with it."""
        try:
            while not self._stopped.is_set():
                if lane.environment is None and not self._open(lane):
                    return
                try:
                    job = self._waiting.get_nowait()
                except queue.Empty:
                    return
                if lane.worker is None or lane.worker.poll() is not None:
                    lane.worker = self._start(lane)
                lane.has_worked = True
                problem = _do(lane.worker, job)
                if problem is not None:
                    lane.worker = None
                    if self._stopped.is_set():  # it was told, and not by its own fault
                        return
                on_end(job, problem)
        except Exception as error:  # of this thread: raised by `run`
            self._errors.append(error)
        finally:
            lane.ended.set()

    def _open(self, lane: _Lane) -> bool:
        """Leases a GPU where there are any; False: none came free before the work was done."""
        environment = dict(os.environ)
        if self.num_threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.num_threads)
        gpus = self.gpus()
        while gpus and not lane.descriptors:
            if self._stopped.is_set() or self._waiting.empty():
                return False
            with contextlib.suppress(LeaseError):
                gpu = lane.stack.enter_context(lease(gpus, wait_seconds=LEASE_SECONDS))
                environment |= gpu.environment()
                lane.descriptors = [gpu.descriptor]
        lane.environment = environment
        return True

    def _start(self, lane: _Lane) -> subprocess.Popen:
        head = this_process().pid
        command = [sys.executable, "-m", "pipeline.point_worker", "--listen", "--head", str(head)]
        worker = subprocess.Popen(
            command, cwd=ROOT, env=lane.environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            pass_fds=lane.descriptors, start_new_session=True,  # Ctrl-C reaches the head alone, which tells the others
        )  # fmt: skip
        if self._stopped.is_set():  # meanwhile
            worker.terminate()
        return worker


def _do(worker: subprocess.Popen, job: Job) -> str | None:
    """Has the worker do the job; what happened to it if it ended meanwhile."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    line = {"number": job.number, "folders": list(map(str, job.folders)), "fused": job.fused}
    try:
        worker.stdin.write(json.dumps(line) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return describe_exit(worker.wait()) or "its process had ended"
    while answer := worker.stdout.readline():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # something else that was printed
            if json.loads(answer)["number"] == job.number:
                return None
    return describe_exit(worker.wait()) or "its process ended before the job did"
