"""A job's process on another machine, started and stopped by the process that Ray or Slurm runs there.

It is sent there by value and needs nothing but the standard library, so that it can say what is missing where the
project is not. The machine needs the project's folder and its Python at the same paths as here: a network file system.
"""

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.jobs import describe_exit

MARKER_SECONDS = 60.0  # for how long a network file system may keep an older list of a folder's files
POLL_SECONDS = 0.2

# The command ends with the process that started it, even when that one is killed: a second try elsewhere would find
# the training locked. Depending on its set-up, Slurm signals every process of a job or the first alone, and a second
# SIGTERM or SIGINT stops a training with no checkpoint: the command is deaf to Slurm, and is told once, by SIGINT.
GUARD = """
import ctypes, os, signal, sys
signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def new_marker(sweep: Path) -> Path:
    """A file that shows a machine that it sees this sweep's folder; removed to tell its workers that all is over."""
    marker = sweep / f".shared-{secrets.token_hex(8)}"
    marker.touch()
    return marker


class RemoteWorker:
    """Runs one command in the project's folder when called; its output goes to the end of `log`.

    Args:
        environment: to be set for the command, besides what the machine's own process has.
        stop_seconds: from SIGINT to SIGKILL when it is stopped: time for a checkpoint.
        requeued: SIGTERM means that Slurm preempts the job and will requeue it, unless the marker is gone.
    """

    def __init__(
        self, command: list[str], root: Path, log: Path, marker: Path, environment: dict[str, str],
        stop_seconds: float, requeued: bool,
    ):  # fmt: skip
        self.command, self.environment, self.stop_seconds, self.requeued = command, environment, stop_seconds, requeued
        self.root, self.log, self.marker = root.absolute(), log.absolute(), marker.absolute()
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = self._told = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None, "_asked": False, "_told": False}

    def __call__(self) -> int | str:
        """The command's exit status (-9: killed by signal 9), or why it was not started.

        When an exception ends it (in Ray KeyboardInterrupt), the command was stopped before.
        """
        problem = self._find_problem()
        if problem:
            return problem
        before = signal.signal(signal.SIGTERM, self._note) if self.requeued else None
        try:
            code = self._run()
            while self._asked and self.marker.exists():  # Slurm requeues what it kills, not what has ended
                time.sleep(POLL_SECONDS)
            return code
        finally:
            if self.requeued:
                signal.signal(signal.SIGTERM, before)

    def _find_problem(self) -> str | None:
        host = socket.gethostname()
        needs = "The machines of a sweep share one folder (a network file system) at the same path."
        if not self.root.is_dir():
            return f"{self.root}: {host} has no such folder. {needs}"
        deadline = time.monotonic() + MARKER_SECONDS
        while not self.marker.exists():
            if time.monotonic() > deadline:
                return f"{self.marker}: {host} does not see this file: another folder, or the sweep is over. {needs}"
            time.sleep(POLL_SECONDS)
        if shutil.which(self.command[0]) is None:
            return f"{self.command[0]}: {host} has no such program. Make the same environment there at the same path."
        return None

    def _note(self, *signal_and_frame: object) -> None:
        self._asked = True

    def _run(self) -> int:
        with self.log.open("ab") as log:
            started = time.strftime("%Y-%m-%d %H:%M:%S %z")
            log.write(f"--- {started}, {socket.gethostname()}: {shlex.join(self.command)}\n".encode())
            log.flush()
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-ISc", GUARD, str(os.getpid()), *self.command], cwd=self.root,
                    env=os.environ | self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,  # Ctrl-C in a terminal is not for it
                )  # fmt: skip
                while not self._ended():
                    if self._asked:
                        self._tell()
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop()
            return self._process.wait()

    def _ended(self) -> bool:
        """Without Popen's lock, which a signal handler may find taken by the code that it interrupted."""
        if self._process is None:
            return True
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _tell(self) -> None:
        if self._process is not None and not self._told and not self._ended():
            self._told = True
            os.kill(self._process.pid, signal.SIGINT)

    def _stop(self) -> None:
        self._tell()
        deadline = time.monotonic() + self.stop_seconds
        while not self._ended():
            if self._process is not None and time.monotonic() > deadline:
                os.kill(self._process.pid, signal.SIGKILL)
            time.sleep(POLL_SECONDS)

    def checkpoint(self) -> Any:
        """What submitit calls in a signal handler before time runs out; the same, called again, goes on."""
        from submitit.helpers import DelayedSubmission

        self._stop()
        return DelayedSubmission(self)


def run_worker(worker: RemoteWorker) -> int | str:
    return worker()


def describe_end(result: int | str, log: Path) -> str | None:
    """What a RemoteWorker gave back, in words, with the last line of its output; None: it ended well."""
    if isinstance(result, str):
        return result
    words = describe_exit(result)
    if words is None:
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"{words}; {log} ends in: {lines[-1]}"
