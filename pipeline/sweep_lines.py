"""What a sweep prints while it runs: what is going to happen, each point that has ended, how far the others are."""

import contextlib
import json
import logging
import queue
import threading
from collections.abc import Iterator, Sequence

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline.files import read_json
from pipeline.points import PROGRESS, Point, State, describe
from pipeline.schema import RuntimeConfig
from pipeline.tracking_sweeps import record_point

logger = logging.getLogger(__name__)
REFRESH_SECONDS = 2.0


@contextlib.contextmanager
def reporting(points: Sequence[Point], runtime: RuntimeConfig | None) -> Iterator["queue.SimpleQueue[Point]"]:
    """Takes points that have ended, prints a line for each, sends it to MLflow, and shows how far the rest is.

    Args:
        runtime: None: nothing is sent.
    """
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
            if runtime is not None:
                record_point(point.folder, runtime)

    thread = threading.Thread(target=work, name="sweep-report", daemon=True)
    with logging_redirect_tqdm(), bar:
        thread.start()
        try:
            yield ended  # type: ignore[misc]
        finally:
            ended.put(None)
            thread.join()


def plan(points: Sequence[Point], unique: Sequence[Point], left: Sequence[Point]) -> str:
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
        return f"{name}: {point.state}: {first_line(point.reason)}"
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


def first_line(reason: str | None) -> str:
    return (reason or "no reason given").strip().splitlines()[0]
