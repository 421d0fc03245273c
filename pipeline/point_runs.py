"""One point of a sweep: its training, its evaluation, and both at once where the store has them."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import store, tracking
from pipeline.files import hash_once, read_json, write_json
from pipeline.imports import code_hash
from pipeline.points import Point, State, Sweep
from pipeline.project_models import ProjectModels
from pipeline.schema import EvaluateConfig
from pipeline.shared_results import is_being_made, make_once
from pipeline.stored_evaluation import find_measured, measure, write_evaluation
from pipeline.stored_training import OnEvent, Training, check_inputs, finished, want, write_training
from pipeline.tracking_sweeps import tag_point
from pipeline.workspace import PROCESSED, RUN, Workspace

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
CONTAMINATION = "contamination.jsonl"
OVERLAP = "contamination"  # its kind among shared results


def workspace_of(point: Point) -> Workspace:
    """The point's folder on both sides: it shows what it shares, too."""
    return Workspace(point.folder, point.folder)


def want_point(point: Point, on_event: OnEvent | None = None) -> Training:
    """The point's training, whose run is a child of the sweep's."""
    config, workspace = point.config, workspace_of(point)
    check_inputs(config, workspace)
    wanted = want(config, workspace)
    run = wanted.run
    if (point.folder.parent / "sweep.json").exists():
        sweep = Sweep.load(point.folder.parent)
        run = tag_point(run, sweep.name, sweep.run_id, point.number, point.command)
    return dataclasses.replace(wanted, run=run, on_event=on_event, is_point=True)


def take_from_store(point: Point) -> bool:
    """Finishes a point that was trained and evaluated before, without a model; False where something is missing."""
    if point.fingerprint is None or not store.is_finished(point.fingerprint):
        return False
    wanted = want_point(point)
    folder = store.entry(wanted.key)
    result = finished(folder)
    if result is None:
        return False
    write_training(wanted, folder, result)
    tracking.write_run(wanted.run, None, wanted.workspace.output(RUN))
    project = ProjectModels(point.config, wanted.workspace, None)
    processed = wanted.workspace.input(PROCESSED)
    models = find_measured(project, processed)
    if models is None:
        return False
    write_evaluation(project, wanted.workspace, models, _contamination(point, processed), {})
    point.training = point.evaluation = "store"
    point.seconds = {"train": 0.0, "evaluate": 0.0}
    point.end(State.finished)
    return True


def evaluate_point(point: Point, device: "torch.device") -> bool:
    """Measures the point's adapter, and what it is compared with where nobody has; says whether the adapter was.

    Raises:
        ConfigError, DataError, ModelError: see `pipeline.stored_evaluation.measure`.
    """
    workspace = workspace_of(point)
    project, processed = ProjectModels(point.config, workspace, device), workspace.input(PROCESSED)
    if not is_being_made(OVERLAP, _overlap_inputs(point.config.evaluate, processed)):
        _contamination(point, processed)  # at first, so that no other worker waits for it in the end
    models, is_new = measure(project, processed)
    write_evaluation(project, workspace, models, _contamination(point, processed), {})
    return is_new


def _contamination(point: Point, processed: Path) -> dict[str, int]:
    """As the evaluate stage measures it; once for all points on the same rows."""
    evaluate = point.config.evaluate

    def make(folder: Path) -> None:
        from pipeline.evaluation import measure_contamination

        write_json(folder / "metrics.json", measure_contamination(processed, evaluate, folder / CONTAMINATION))

    found = make_once(OVERLAP, _overlap_inputs(evaluate, processed), make)
    shutil.copy2(found / CONTAMINATION, workspace_of(point).output(f"reports/evaluate/{CONTAMINATION}"))
    return dict(read_json(found / "metrics.json"))


def _overlap_inputs(evaluate: EvaluateConfig, processed: Path) -> dict[str, Any]:
    """What decides the test rows' overlap with the training rows."""
    return {
        "rows": [hash_once(processed / f"{split}.arrow") for split in ("train", "test")],
        "settings": [evaluate.max_rows, evaluate.contamination_ngram, evaluate.contamination_share],
        "code": code_hash("pipeline.evaluation"),
    }
