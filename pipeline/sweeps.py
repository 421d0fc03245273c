"""The head of a sweep: makes the points and what they share, has the store or a backend give their results, reports.

python -m stages.train -m lora.r=4,8,16 train.learning_rate=2e-3,5e-3
"""

import contextlib
import json
import logging
import math
import queue
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline.config import quiet_logs
from pipeline.errors import DataError, PipelineError
from pipeline.files import read_json
from pipeline.fusion import fusion_key, reason_alone
from pipeline.jobs import Backend, Job
from pipeline.point_runs import take_from_store, workspace_of
from pipeline.points import POINT, PROGRESS, SWEEP, Point, State, Sweep, describe, link_inputs
from pipeline.schema import RuntimeConfig
from pipeline.shared_inputs import SharedInputs
from pipeline.stored_training import identify
from pipeline.sweep_points import Composer, find_axes, make_points
from pipeline.tracking_sweeps import open_sweep, record_point, record_sweep

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

    def launch(self, all_overrides: Sequence[Sequence[str]], first: int) -> list[Path]:
        """Brings a point for each list of overrides to its end; its record tells which.

        Args:
            first: number of the first one.

        Raises:
            DataError: what the points share cannot be made.
            KeyboardInterrupt: stopped; everything is kept, and the same command goes on.
        """
        quiet_logs()
        points = make_points(
            self.folder, all_overrides, first, [*self.runtime, "runtime.progress=false"], self._composer, self.searched
        )
        sweep = self._open(points, all_overrides, first)
        try:
            ready = self._prepare([point for point in points if point.state is State.waiting])
            firsts = {point.fingerprint: point for point in reversed(ready)}
            unique = [point for point in ready if firsts[point.fingerprint] is point]
            left = [point for point in unique if not take_from_store(point)]
            logger.info("%s: %s", self.folder, _plan(points, unique, left))
            with self._reporting(points) as report:
                self._run(left, report)
            for point in ready:
                if point not in unique:
                    _copy(firsts[point.fingerprint], point)
        except KeyboardInterrupt:
            self._interrupt(points)
            raise
        sweep.save()
        return [point.folder for point in points]

    def finish(self) -> None:
        """Prints what came of the sweep, records it.

        Raises:
            SystemExit: a point failed: 1.
        """
        from pipeline.compare import compare

        sweep = self._sweep
        assert sweep is not None
        self.backend.close()
        points = sweep.load_points()
        failed = [point for point in points if point.state is State.failed]
        sweep.end(State.failed if failed else State.finished)
        if any(point.state is State.finished for point in points):
            print(compare(self.folder).text)
        if self._runtime_config is not None:
            record_sweep(self.folder, self._runtime_config)
        counts = Counter(point.training if point.state is State.finished else str(point.state) for point in points)
        print(f"{self.folder}: {len(points)} points: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
        for point in failed:
            print(f"  failed: {point.folder.name} ({describe(point.swept)}): {_first_line(point.reason)}")
        if failed:
            print(f"{len(failed)} of {len(points)} points failed; the same command tries them again.")
            raise SystemExit(1)

    def _open(self, points: list[Point], all_overrides: Sequence[Sequence[str]], first: int) -> Sweep:
        """Writes the records of sweep and points, and opens the parent run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = Sweep.load(self.folder).load_points() if (self.folder / SWEEP).exists() else []
        launched = range(first, first + len(points)) if self.searched is not None else range(first, sys.maxsize)
        before = [point for point in before if point.number not in launched]
        if self._sweep is None:
            self._sweep = Sweep(self.folder, self.command, self.launcher, started=int(time.time() * 1000))
        sweep = self._sweep
        sweep.axes = find_axes([*(point.overrides for point in before), *all_overrides])
        sweep.points = sorted(point.folder.name for point in [*before, *points])
        sweep.state = State.running
        for point in points:
            point.folder.mkdir(exist_ok=True)
            point.save()
        sweep.save()
        self._runtime_config = next((point.config.runtime for point in points if point.settings), None)
        if sweep.run_id is None and self._runtime_config is not None:
            sweep.run_id = open_sweep(self.folder, self._runtime_config)
            sweep.save()
        return sweep

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
            fingerprint, _ = identify(point.config, workspace_of(point))
            if _fingerprint_in(point.folder) not in (None, fingerprint):
                for name in MADE_BEFORE:
                    shutil.rmtree(point.folder / name, ignore_errors=True)
                link_inputs(point.folder, inputs.processed, inputs.quantized)
            point.fingerprint = fingerprint
            point.save()
            ready.append(point)
        return ready

    def _run(self, points: Sequence[Point], report: "queue.SimpleQueue[Point]") -> None:
        if not points:
            return
        by_folder = {point.folder: point for point in points}

        def on_end(job: Job, problem: str | None) -> None:
            for folder in job.folders:
                point = Point.load(folder)
                if problem is not None and point.state in (State.waiting, State.running):
                    point.end(State.failed, f"{problem} (see {job.folders[0] / 'worker.log'})")
                by_folder[folder].__dict__.update(point.__dict__)
                report.put(by_folder[folder])

        self.backend.run(self._jobs(points), on_end)

    def _jobs(self, points: Sequence[Point]) -> list[Job]:
        if not self.fused:
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

    @contextlib.contextmanager
    def _reporting(self, points: Sequence[Point]) -> Iterator["queue.SimpleQueue[Point]"]:
        """Takes points that have ended, prints a line for each, sends it to MLflow, and shows how far the rest is."""
        ended: queue.SimpleQueue[Point | None] = queue.SimpleQueue()
        shown = any(point.state is State.waiting for point in points)
        done = sum(point.state is not State.waiting for point in points)
        bar = tqdm(total=len(points), initial=done, desc="points", unit="point", disable=not shown, smoothing=0)

        def work() -> None:
            while True:
                try:
                    point = ended.get(timeout=REFRESH_SECONDS)
                except queue.Empty:
                    bar.set_postfix_str(_running(points))
                    continue
                if point is None:
                    return
                logger.info("%s", _line(point))
                bar.update()
                if self._runtime_config is not None:
                    record_point(point.folder, self._runtime_config)

        thread = threading.Thread(target=work, name="sweep-report", daemon=True)
        with logging_redirect_tqdm(), bar:
            thread.start()
            try:
                yield ended  # type: ignore[misc]
            finally:
                ended.put(None)
                thread.join()

    def _interrupt(self, points: Sequence[Point]) -> None:
        for point in points:
            if (point.folder / POINT).exists():
                point = Point.load(point.folder)
            if point.state in (State.waiting, State.running):
                point.end(State.interrupted, "the sweep was stopped")
        assert self._sweep is not None
        self._sweep.end(State.interrupted)
        done = sum(Point.load(point.folder).state is State.finished for point in points)
        logger.info("%s: stopped; %d of %d points are done", self.folder, done, len(points))
        if self._runtime_config is not None:
            record_sweep(self.folder, self._runtime_config)


def _plan(points: Sequence[Point], unique: Sequence[Point], left: Sequence[Point]) -> str:
    """What is going to happen, in a line."""
    failed = sum(point.state is State.failed for point in points)
    same = len(points) - failed - len(unique)
    parts = [f"{len(points)} points", f"{len(left)} to do", f"{len(unique) - len(left)} from the store"]
    parts += [f"{same} the same as another"] if same else []
    parts += [f"{failed} cannot be"] if failed else []
    return ", ".join(parts)


def _line(point: Point) -> str:
    """An ended point in a line."""
    name = f"{point.folder.name} {describe(point.swept)}"
    if point.state is not State.finished:
        return f"{name}: {point.state}: {_first_line(point.reason)}"
    train, evaluate = (read_json(point.folder / f"metrics/{stage}.json") for stage in ("train", "evaluate"))
    seconds = sum(point.seconds.values())
    together = f", fused with {point.fused_with}" if point.fused_with else ""
    return (
        f"{name}: validation loss {train['validation_loss']:.4f}, test loss {evaluate['adapter']['loss']:.4f} "
        f"({point.training}{together}, {seconds:.0f} s)"
    )


def _running(points: Sequence[Point]) -> str:
    """Points in work and their steps."""
    found = []
    for point in points:
        path = point.folder / PROGRESS
        if point.state is State.waiting and path.exists():
            with contextlib.suppress(OSError, ValueError):
                found.append(f"{point.folder.name} step {json.loads(path.read_text(encoding='utf-8'))['step']}")
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _copy(source: Point, point: Point) -> None:
    """A point with the settings of another one, in other words, has the other one's end."""
    if source.state is State.finished and take_from_store(point):
        return
    point.end(source.state, f"the same training as {source.folder.name}: {source.reason}")


def _fingerprint_in(folder: Path) -> str | None:
    """Of the training that the folder holds already."""
    with contextlib.suppress(DataError, KeyError):
        return str(read_json(folder / "metrics/train.json")["fingerprint"])
    return None


def _first_line(reason: str | None) -> str:
    return (reason or "no reason given").strip().splitlines()[0]
