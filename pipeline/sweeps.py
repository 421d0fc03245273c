"""The head of a sweep: makes the points and what they share, has the store or a backend give their results, reports.

python -m stages.train -m lora.r=4,8,16 train.learning_rate=2e-3,5e-3
"""

import contextlib
import fcntl
import logging
import math
import queue
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from pipeline.config import quiet_logs
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.files import read_json
from pipeline.fusion import fusion_key, reason_alone
from pipeline.jobs import Backend, Job
from pipeline.point_runs import take_from_store, workspace_of
from pipeline.points import PROGRESS, SWEEP, Point, State, Sweep, describe, link_inputs
from pipeline.pruning import TRIAL
from pipeline.schema import RuntimeConfig
from pipeline.shared_inputs import SharedInputs
from pipeline.stored_training import identify
from pipeline.sweep_lines import first_line, plan, reporting
from pipeline.sweep_points import Composer, find_axes, make_points
from pipeline.tracking_sweeps import open_sweep, record_sweep

logger = logging.getLogger(__name__)
MADE_BEFORE = ("models", "metrics", "reports")  # in a point's folder, by another point
REFRESH_SECONDS = 2.0


@dataclass
class SweepRun:
    """A sweep on its way; `launch` may be called several times, by a search that asks for points bit by bit.

    Attributes:
        folder: `multirun/NAME`.
        command: what the user typed.
        launcher: the backend's name, for the record.
        fused: points that can share a base are trained together, `max_fused` of them at most in one process.
        runtime: overrides that every point gets and that do not change its result.
        searched: the keys that a search varies, whose points come bit by bit; None: all points are launched at once.
    """

    folder: Path
    command: str
    launcher: str
    backend: Backend
    fused: bool = False
    max_fused: int = 8
    runtime: Sequence[str] = ()
    searched: Sequence[str] | None = None
    _composer: Composer = field(default_factory=Composer, init=False)
    _inputs: SharedInputs = field(default_factory=SharedInputs, init=False)
    _sweep: Sweep | None = field(default=None, init=False)
    _runtime_config: RuntimeConfig | None = field(default=None, init=False)
    _held: TextIO | None = field(default=None, init=False)  # the lock of the folder, as long as this process lives

    def __post_init__(self) -> None:
        if self.max_fused < 1:
            raise ConfigError(f"hydra.launcher.max_fused: {self.max_fused} must be 1 or more.")

    def launch(self, all_overrides: Sequence[Sequence[str]], first: int) -> list[Path]:
        """Brings a point for each list of overrides to its end; its record tells which.

        Args:
            first: number of the first one.

        Raises:
            DataError: what the points share cannot be made.
            KeyboardInterrupt: stopped; everything is kept, and the same command goes on.
        """
        quiet_logs()
        points: list[Point] = []
        with _terminable():
            try:
                runtime = [*self.runtime, "runtime.progress=false"]
                points = make_points(self.folder, all_overrides, first, runtime, self._composer, self.searched)
                self._open(points, all_overrides, first)
                self._work(points)
            except BaseException as error:
                self._break_off(points, error)
                raise
        return [point.folder for point in points]

    def finish(self) -> None:
        """Prints what came of the sweep, records it.

        Raises:
            SystemExit: a point failed, or was stopped from outside: 1.
        """
        sweep = self._sweep
        assert sweep is not None
        with _terminable():
            self.backend.close()
            from pipeline.compare import compare  # pictures

            points = sweep.load_points()
            lost = [point for point in points if point.state not in (State.finished, State.pruned)]
            sweep.end(State.failed if lost else State.finished)
            try:
                if any(point.state is State.finished for point in points):
                    print(compare(self.folder).text)
            except PipelineError as error:
                print(f"no comparison: {error}")
            if self._runtime_config is not None:
                record_sweep(self.folder, self._runtime_config)
        counts = Counter(point.training if point.state is State.finished else str(point.state) for point in points)
        print(f"{self.folder}: {len(points)} points: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
        for point in lost:
            print(f"  {point.state}: {point.folder.name} ({describe(point.swept)}): {first_line(point.reason)}")
        if lost:
            print(f"{len(lost)} of {len(points)} points failed; the same command tries them again.")
            raise SystemExit(1)

    def _open(self, points: list[Point], all_overrides: Sequence[Sequence[str]], first: int) -> None:
        """Writes the records of sweep and points, and opens the parent run.

        Raises:
            ConfigError: another process is at work in this folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        goes_on = (first or self.searched is not None) and (self.folder / SWEEP).exists()
        before = Sweep.load(self.folder).load_points() if goes_on else []
        launched = range(first, first + len(points)) if self.searched is not None else range(first, sys.maxsize)
        before = [point for point in before if point.number not in launched]
        if self._sweep is None:
            self._sweep = Sweep(self.folder, self.command, self.launcher, started=int(time.time() * 1000))
        sweep = self._sweep
        sweep.axes = find_axes([*(point.overrides for point in before), *all_overrides])
        sweep.points = [p.folder.name for p in sorted([*before, *points], key=lambda point: point.number)]
        sweep.state = State.running
        num_new = sum(not self._open_point(point) and point.state is State.waiting for point in points)
        if num_new:
            self.backend.expect(num_new)
        sweep.save()
        self._runtime_config = next((point.config.runtime for point in points if point.settings), None)
        if sweep.run_id is None and self._runtime_config is not None:
            sweep.run_id = open_sweep(self.folder, self._runtime_config)
            sweep.save()

    def _lock(self) -> None:
        if self._held is not None:
            return
        self._held = (self.folder / ".lock").open("a")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.folder}: another sweep is at work there. Wait, or choose another name.") from None

    def _open_point(self, point: Point) -> bool:
        """Makes the point's folder ready; of other settings that were there before nothing stays.

        Returns:
            Whether it was finished before, with these settings.
        """
        point.folder.mkdir(exist_ok=True)
        old = None
        with contextlib.suppress(DataError):
            old = Point.load(point.folder)
        if old is None or old.settings != point.settings:
            for name in MADE_BEFORE:
                shutil.rmtree(point.folder / name, ignore_errors=True)
        (point.folder / PROGRESS).unlink(missing_ok=True)
        if self.searched is None:
            (point.folder / TRIAL).unlink(missing_ok=True)  # of a search that had this folder
        is_finished = old is not None and old.state is State.finished and old.settings == point.settings
        if not is_finished:  # one that is stays so until something takes its place
            point.save()
        return is_finished

    def _work(self, points: Sequence[Point]) -> None:
        """Brings the points that can be to their ends."""
        assert self._sweep is not None
        ready = self._prepare([point for point in points if point.state is State.waiting])
        firsts = {point.fingerprint: point for point in reversed(ready)}
        unique = [point for point in ready if firsts[point.fingerprint] is point]
        left = [point for point in unique if not _take(point)]
        if any(point.config.evaluate.harness_tasks for point in ready):
            logger.warning(
                "evaluate.harness_tasks: not run for points; use `python -m pipeline.harness` on what you adopt"
            )
        logger.info("%s: %s", self.folder, plan(points, unique, left))
        with reporting(points, self._runtime_config) as report:
            self._run(left, report)
            same = [point for point in ready if point not in unique]
            for point in same:
                source = firsts[point.fingerprint]
                if source.state is not State.finished:
                    point.end(source.state, f"the same training as {source.folder.name}: {source.reason}")
            # a training that is another one's may be evaluated otherwise
            self._run([p for p in same if p.state is State.waiting and not _take(p)], report, fused=False)
        self._sweep.save()

    def _prepare(self, points: list[Point]) -> list[Point]:
        """Gives the points their inputs and fingerprints; those that cannot have them have failed."""
        found = self._inputs.of(points) if points else {}
        ready = []
        for point in points:
            inputs = found[point.number]
            if isinstance(inputs, PipelineError):
                point.end(State.failed, str(inputs))
                continue
            link_inputs(point.folder, inputs.processed, inputs.quantized)
            try:
                fingerprint, _ = identify(point.config, workspace_of(point))
            except PipelineError as error:
                point.end(State.failed, str(error))
                continue
            if _fingerprint_in(point.folder) not in (None, fingerprint):
                for name in MADE_BEFORE:
                    shutil.rmtree(point.folder / name, ignore_errors=True)
                link_inputs(point.folder, inputs.processed, inputs.quantized)
            point.fingerprint = fingerprint
            ready.append(point)
        return ready

    def _run(self, points: Sequence[Point], report: "queue.SimpleQueue[Point]", fused: bool | None = None) -> None:
        """Has the backend do the points; those of a fused job that was killed once more, each alone."""
        by_folder, again = {point.folder: point for point in points}, []

        def on_end(job: Job, problem: str | None) -> None:
            for folder in job.folders:
                point = Point.load(folder)
                if point.state in (State.waiting, State.running):
                    if job.fused and problem is not None:
                        logger.warning("%s: %s; once more, alone", folder.name, problem)
                        point.end(State.waiting)
                        again.append(point)
                        continue
                    why = problem or "its process ended without a word"
                    point.end(State.failed, f"{why} (see {job.folders[0] / 'worker.log'})")
                by_folder[folder].__dict__.update(point.__dict__)
                report.put(by_folder[folder])

        for point in points:
            point.save()
        if points:
            self.backend.run(self._jobs(points, self.fused if fused is None else fused), on_end)
        if again:
            self._run([by_folder[point.folder] for point in again], report, fused=False)

    def _jobs(self, points: Sequence[Point], fused: bool) -> list[Job]:
        if not fused:
            return [Job(number, (point.folder,)) for number, point in enumerate(points)]
        groups: dict[object, list[Point]] = {}
        for point in points:
            key = fusion_key(point.config)
            if key is None:
                logger.info("%s is trained alone: %s", point.folder.name, reason_alone(point.config))
            shared = (key, (point.folder / "data/processed").resolve(), (point.folder / "models/quantized").resolve())
            groups.setdefault(shared if key is not None else point.number, []).append(point)
        jobs: list[list[Point]] = []
        for group in groups.values():
            size = min(self.max_fused, math.ceil(len(group) / self.backend.count()))
            jobs += [group[start : start + size] for start in range(0, len(group), size)]
        return [Job(n, tuple(point.folder for point in job), fused=len(job) > 1) for n, job in enumerate(jobs)]

    def _break_off(self, points: Sequence[Point], error: BaseException) -> None:
        """Writes down that the sweep ends here, and why."""
        if self._sweep is None:
            return
        is_stop = isinstance(error, KeyboardInterrupt)
        for point in points:
            with contextlib.suppress(DataError):
                now = Point.load(point.folder)
                if now.state in (State.waiting, State.running):
                    now.end(State.interrupted, "the sweep was stopped" if is_stop else f"the sweep ended: {error}")
                point.state = now.state
        self._sweep.end(State.interrupted if is_stop else State.failed)
        done = sum(point.state is State.finished for point in points)
        logger.info("%s: stopped; %d of %d points are done", self.folder, done, len(points))
        if self._runtime_config is not None:
            record_sweep(self.folder, self._runtime_config)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is as Ctrl-C while inside: what is written down is the same."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _take(point: Point) -> bool:
    """Whether the store had all of the point; what is damaged there is made again by a worker."""
    try:
        return take_from_store(point)
    except (PipelineError, OSError) as error:
        logger.warning("%s: not taken from the store: %s", point.folder.name, error)
        return False


def _fingerprint_in(folder: Path) -> str | None:
    """Of the training that the folder holds already."""
    with contextlib.suppress(DataError, KeyError):
        return str(read_json(folder / "metrics/train.json")["fingerprint"])
    return None
