"""Measure base, quantized base and adapter on the test split and on general text.

Consumes: data/processed, the base, models/quantized, models/adapter.
Produces: metrics/evaluate.json; in reports/evaluate: predictions.jsonl, items.jsonl, contamination.jsonl, harness.json.
Command: python -m stages.evaluate evaluate.max_rows=50
"""

import gc
import logging

from pipeline import tracking
from pipeline.config import stage
from pipeline.evaluation import evaluate_model, join_answers, measure_contamination
from pipeline.evidence import FILE, Evidence, ModelItems, join_items
from pipeline.files import hash_path, write_json, write_jsonl
from pipeline.harness import measure_models
from pipeline.harness_scores import as_metrics, as_rows
from pipeline.model_files import weight_bytes
from pipeline.project_models import ProjectModels
from pipeline.provenance import FILE as PROVENANCE
from pipeline.provenance import check_provenance, write_provenance
from pipeline.runtime import select_device
from pipeline.schema import QuantizationMethod, RunConfig
from pipeline.tokenizer import load_tokenizer
from pipeline.workspace import PROCESSED, Workspace

logger = logging.getLogger(__name__)
MODELS = ("base", "quantized", "adapter")


def run(config: RunConfig, workspace: Workspace) -> None:
    project = ProjectModels(config, workspace, select_device(config.runtime))
    processed = workspace.input(PROCESSED)
    check_provenance(processed, config.data, config.model)
    is_plain = config.quantization.method is QuantizationMethod.none
    folders = {name: project.find("base" if name == "quantized" and is_plain else name) for name in MODELS}
    reports = workspace.output(f"reports/evaluate/{PROVENANCE}").parent
    contamination = measure_contamination(processed, config.evaluate, reports / "contamination.jsonl")
    tokenizer = load_tokenizer(config.model)
    models: dict[str, ModelItems] = {}
    for name in MODELS:
        if name == "quantized" and is_plain:
            logger.info("quantized: the base's figures (quantization.method is none)")
            models[name] = models["base"]
            continue
        model = project.load(name)
        models[name] = evaluate_model(
            model, tokenizer, processed, config.evaluate, name=name, progress=config.runtime.progress
        )
        del model  # one in memory at a time
        gc.collect()
    tasks, limit = config.evaluate.harness_tasks, config.evaluate.harness_limit
    harness = measure_models(project, tasks, ("base", "adapter") if is_plain else MODELS, limit) if tasks else {}
    write_json(reports / "harness.json", {"limit": limit, "results": as_rows(harness)})
    items = join_items(models)
    write_jsonl(reports / FILE, items)
    write_jsonl(reports / "predictions.jsonl", join_answers({name: found.answers for name, found in models.items()}))
    write_provenance(reports, "evaluate", config.evaluate, adapter_sha256=hash_path(folders["adapter"]))
    evidence = Evidence(items, num_resamples=1)
    metrics = {
        **{name: evidence.values(name) for name in MODELS},
        "forgetting": evidence.forgetting("adapter").difference,
        "contamination": contamination,
        "bytes": {name: weight_bytes(folder) for name, folder in folders.items()},
        "harness": as_metrics(harness),
    }
    write_json(workspace.output("metrics/evaluate.json"), metrics)
    tracking.record_stage("evaluate", config.runtime, workspace.outputs)


main = stage(run, "evaluate")

if __name__ == "__main__":
    main()
