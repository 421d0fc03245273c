"""Measure base, quantized base and adapter on the test split and on general text.

Consumes: data/processed, the base, models/quantized, models/adapter.
Produces: metrics/evaluate.json; in reports/evaluate: predictions.jsonl, items.jsonl, contamination.jsonl, harness.json.
Command: python -m stages.evaluate evaluate.max_rows=50
"""

from pipeline import tracking
from pipeline.config import stage
from pipeline.evaluation import measure_contamination
from pipeline.files import write_json
from pipeline.harness import measure_models
from pipeline.harness_scores import as_metrics, as_rows
from pipeline.project_models import ProjectModels
from pipeline.provenance import check_provenance
from pipeline.runtime import select_device
from pipeline.schema import RunConfig
from pipeline.stored_evaluation import MODELS, is_plain, measure, write_evaluation
from pipeline.workspace import PROCESSED, Workspace


def run(config: RunConfig, workspace: Workspace) -> None:
    project = ProjectModels(config, workspace, select_device(config.runtime))
    processed = workspace.input(PROCESSED)
    check_provenance(processed, config.data, config.model)
    for name in MODELS:  # all are there, before the first is measured
        project.find("base" if name == "quantized" and is_plain(config) else name)
    reports = workspace.output("reports/evaluate/harness.json").parent
    contamination = measure_contamination(processed, config.evaluate, reports / "contamination.jsonl")
    models, _ = measure(project, processed)
    tasks, limit = config.evaluate.harness_tasks, config.evaluate.harness_limit
    of_tasks = ("base", "adapter") if is_plain(config) else MODELS
    harness = measure_models(project, tasks, of_tasks, limit) if tasks else {}
    write_json(reports / "harness.json", {"limit": limit, "results": as_rows(harness)})
    write_evaluation(project, workspace, models, contamination, as_metrics(harness))
    tracking.record_stage("evaluate", config.runtime, workspace.outputs)


main = stage(run, "evaluate")

if __name__ == "__main__":
    main()
