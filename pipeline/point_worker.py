"""Trains and evaluates the points of jobs: a process of its own, so that what kills it kills no more than a job.

    python -m pipeline.point_worker multirun/NAME/000 multirun/NAME/001 [--fused]     # one job
    python -m pipeline.point_worker --listen     # jobs from standard input, a JSON line each; answers likewise

What becomes of each point stands in its `point.json`; what a job prints, in `worker.log` of its first point.
"""

import argparse
import contextlib
import gc
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import quiet_logs
from pipeline.errors import Interrupted, PipelineError, Pruned
from pipeline.files import write_text
from pipeline.point_runs import evaluate_point, want_point
from pipeline.points import PROGRESS, Point, State
from pipeline.stored_training import OnEvent, Trained, train

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
PROGRESS_SECONDS = 1.0
WATCH_SECONDS = 1.0
NEEDED = ("pipeline.fused_finetuning", "pipeline.evaluation", "pipeline.tokenizer", "pipeline.tracking_live")


def run_job(folders: Sequence[Path], fused: bool) -> None:
    """Trains the points (fused: together), then evaluates each.

    Raises:
        Interrupted: stopped; the points that were not done are marked so.
    """
    points = [Point.load(folder) for folder in folders]
    for group in [points] if fused else [[point] for point in points]:
        try:
            _run_together(group)
        except (Interrupted, KeyboardInterrupt):
            for point in points:
                if point.state in (State.waiting, State.running):
                    point.end(State.interrupted, "the sweep was stopped")
            raise
        except Exception as error:  # a bug, a driver, the disk: this group's end and nobody else's
            logger.exception("this job failed")
            for point in group:
                if point.state is State.running:
                    point.end(
                        State.failed, f"{type(error).__name__}: {str(error).strip() or 'no message'} (see worker.log)"
                    )


def _run_together(points: Sequence[Point]) -> None:
    from pipeline.runtime import select_device

    for point in points:
        point.end(State.running)
    configs = [point.config for point in points]
    device = select_device(configs[0].runtime)
    trainings = [want_point(point, _on_event(point)) for point in points]
    outcomes = train(trainings, device)
    for point, training, outcome in zip(points, trainings, outcomes, strict=True):
        point.fingerprint = training.key
        if isinstance(outcome, Pruned):
            point.end(State.pruned, str(outcome))
        elif isinstance(outcome, PipelineError):
            logger.error("point %s: %s", point.folder.name, outcome)
            point.end(State.failed, str(outcome))
        else:
            _finish(point, outcome, device)


def _finish(point: Point, trained: Trained, device: "torch.device") -> None:
    """Records the training, evaluates the adapter, records that."""
    point.training, point.run_id = trained.source, trained.run_id
    if trained.source != "store":
        point.fused_with = trained.result["metrics"].get("fused_with", 0)
    point.seconds["train"] = trained.seconds
    started = time.perf_counter()
    try:
        is_new = evaluate_point(point, device)
    except Interrupted:
        raise
    except Exception as error:  # this point's end and no other's
        logger.exception("evaluation")
        return point.end(State.failed, f"trained, and its evaluation failed: {error}")
    point.evaluation = "new" if is_new else "store"
    point.seconds["evaluate"] = time.perf_counter() - started
    point.end(State.finished)


def _on_event(point: Point) -> OnEvent:
    """Says how far the training is, and asks the search, if there is one, whether it is worth going on."""
    from pipeline.pruning import pruner_for

    steps = point.config.train.max_steps
    should_stop, said = pruner_for(point.folder, steps), 0.0

    def on_event(step: int, event: dict[str, float]) -> None:
        nonlocal said
        if time.monotonic() - said >= PROGRESS_SECONDS:
            said = time.monotonic()
            write_text(point.folder / PROGRESS, json.dumps({"step": step}))
        loss = event.get("validation.loss")
        if loss is not None and should_stop is not None and should_stop(step, loss):
            raise Pruned(f"given up after step {step} at a validation loss of {loss:.4f}: others are better by then")

    return on_event


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Everything that this process prints goes to the file, also what C libraries print."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    with path.open("a", encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    quiet_logs()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), before, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def _listen() -> None:
    """Does the jobs that standard input names, one after another, and answers each."""
    for module in NEEDED:  # while the head is not yet done with its own beginning
        with contextlib.suppress(Exception):  # a job that needs it will say so in its log
            importlib.import_module(module)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        job = json.loads(line)
        folders = [Path(folder) for folder in job["folders"]]
        with _logging_to(folders[0] / "worker.log"):
            run_job(folders, job["fused"])
        answers.write(json.dumps({"number": job["number"]}) + "\n")


def _end_with(head: int) -> None:
    """Ends this process as SIGTERM does, with a checkpoint, when the sweep that started it is gone."""

    def watch() -> None:
        while os.getppid() == head:
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch", daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.point_worker", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folders", nargs="*", type=Path, help="of points, each with its point.json")
    parser.add_argument("--fused", action="store_true", help="train them together on one base")
    parser.add_argument("--listen", action="store_true", help="take jobs from standard input")
    parser.add_argument("--head", type=int, help="process without which this one ends")
    options = parser.parse_args(arguments)
    if not options.listen:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, also before and after a training
    if options.head is not None:
        _end_with(options.head)
    try:
        if options.listen:
            _listen()
        else:
            quiet_logs()
            run_job(options.folders, options.fused)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    exit_code = main()
    gc.freeze()  # see `pipeline.config.stage`
    sys.exit(exit_code)
