"""Jobs of a sweep: points that one process trains and evaluates, one after another or fused."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Job:
    """Attributes:
    folders: of the points, each with its `point.json`.
    fused: the points are trained together.
    """

    number: int
    folders: tuple[Path, ...]
    fused: bool = False

    @property
    def name(self) -> str:
        return ", ".join(folder.name for folder in self.folders)


OnEnd = Callable[[Job, str | None], None]


class Backend(Protocol):
    """Runs jobs somewhere; one that fails never stops the others."""

    def count(self) -> int:
        """Jobs that run at once."""

    def expect(self, num_jobs: int) -> None:
        """Jobs will probably come, so many at most: what takes time to start may start."""

    def close(self) -> None:
        """No more jobs come."""

    def run(self, jobs: Sequence[Job], on_end: OnEnd) -> None:
        """Returns when all have ended.

        Args:
            on_end: is called once a job, with None when its process ended well (its points' records tell what became
                of them), else with what happened, in words.

        Raises:
            KeyboardInterrupt: stopped; running jobs were told by SIGTERM and wrote their checkpoints.
        """


def worker_command(job: Job) -> list[str]:
    """The process that does the job, to be started in the project's folder."""
    return [sys.executable, "-m", "pipeline.point_worker", *map(str, job.folders), *(["--fused"] if job.fused else [])]


def describe_exit(code: int) -> str | None:
    """An exit status in words; None for 0."""
    if code == 0:
        return None
    if code in (-9, 137):
        return "killed by signal 9: if nobody did it, the machine ran out of memory"
    return f"killed by signal {-code}" if code < 0 else f"its process ended with exit status {code}"
