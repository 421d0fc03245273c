"""The DVC that started this process, and whether it is still there.

A DVC that is killed leaves its stage's process running, with nobody to store what it makes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.launched import LAUNCHER, by_a_stage

SLACK_SECONDS = 2.0  # the kernel gives the boot time in whole seconds, and it may turn over between two readings
ADOPTERS = ("init", "systemd")  # besides pid 1


@dataclass(frozen=True)
class KnownProcess:
    """A process that a later one with the same number is not taken for.

    Attributes:
        created: seconds since the machine booted: setting the clock does not change it.
    """

    pid: int
    created: float

    @classmethod
    def of(cls, process: psutil.Process) -> "KnownProcess":
        booted = psutil.boot_time()
        return cls(process.pid, process.create_time() - booted)

    def gone(self) -> bool:
        """Whether it has ended; a zombie has. Takes some 100 microseconds."""
        try:
            process = psutil.Process(self.pid)
            is_another = abs(self.of(process).created - self.created) > SLACK_SECONDS
            return is_another or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


DIED_BEFORE = KnownProcess(0, -1e9)  # a starter that ended before anybody looked


def this_process() -> KnownProcess:
    return KnownProcess.of(psutil.Process())


def find_starter() -> KnownProcess | None:
    """The DVC process that runs this process as a stage's command; None when no DVC does.

    DVC sets DVC_STAGE for what it starts: it is the nearest ancestor that was started without this value (a shell
    or a wrapper in between inherits it; a DVC inside a stage of another has the other's). Under `dvc exp run` and
    `--temp` it is that process, in the queue `dvc exp exec-run`.
    """
    stage = os.environ.get("DVC_STAGE")
    if not stage:
        return None
    for ancestor in psutil.Process().parents():
        if _stage_of(ancestor) == stage:
            continue
        try:
            program = Path(ancestor.exe()).name.lower()
            if program.startswith(("python", "dvc")):
                return KnownProcess.of(ancestor)
            adopted = ancestor.pid == 1 or program in ADOPTERS
        except psutil.AccessDenied:  # not this user's
            adopted = ancestor.pid == 1
        except psutil.NoSuchProcess:  # it ended just now
            adopted = True
        return DIED_BEFORE if adopted else None  # None: sshd, slurmstepd: what lies behind is out of sight
    return None


class Starters:
    """Whose end is to end this process too: its DVC, and what launched it as one of several."""

    def __init__(self) -> None:
        found = {"its dvc": find_starter(), "what launched it": _launcher()}
        self._processes = {who: process for who, process in found.items() if process is not None}

    def death(self) -> str | None:
        """Which of them is gone, for a message; None where all are there."""
        return next((f"the death of {who}" for who, process in self._processes.items() if process.gone()), None)


def _launcher() -> KnownProcess | None:
    if by_a_stage():
        pid, created = os.environ[LAUNCHER].split()
        return KnownProcess(int(pid), float(created))
    return None  # somebody's own `accelerate launch` or `srun` looks after its processes


def _stage_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("DVC_STAGE")
    except psutil.Error:
        return None
