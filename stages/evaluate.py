"""Measure base, quantized base and adapter on the test split and on general text.

Consumes: data/processed, the base, models/quantized, models/adapter.
Produces: metrics/evaluate.json, reports/evaluate.
Command: python -m stages.evaluate evaluate.max_rows=50
"""

import gc
import logging
from pathlib import Path
from typing import Any

import torch

from pipeline import tracking
from pipeline.config import stage
from pipeline.evaluation import evaluate_model, forgetting
from pipeline.evaluation_reports import write_reports
from pipeline.files import hash_path, write_json
from pipeline.generation import Model
from pipeline.lora import load_adapter
from pipeline.modeling import load_model, load_model_folder
from pipeline.provenance import check_provenance, write_provenance
from pipeline.quantization import load_quantized, load_training_base
from pipeline.runtime import select_device, torch_dtype
from pipeline.schema import QuantizationMethod, RunConfig, TrainMethod
from pipeline.tokenizer import load_tokenizer
from pipeline.workspace import ADAPTER, PROCESSED, QUANTIZED, Workspace

logger = logging.getLogger(__name__)
MODELS = ("base", "quantized", "adapter")


def run(config: RunConfig, workspace: Workspace) -> None:
    device = select_device(config.runtime)
    processed, quantized, adapter = (workspace.input(name) for name in (PROCESSED, QUANTIZED, ADAPTER))
    check_provenance(processed, config.data, config.model)
    check_provenance(quantized, config.model, config.quantization)
    check_provenance(adapter, config.train, config.lora)
    tokenizer = load_tokenizer(config.model)
    scores: dict[str, dict[str, float]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in MODELS:
        if name == "quantized" and config.quantization.method is QuantizationMethod.none:
            logger.info("quantized: the base's figures (quantization.method is none)")
            scores[name], rows[name] = scores["base"], rows["base"]
            continue
        model = _load(name, config, quantized, adapter, device)
        scores[name], rows[name] = evaluate_model(
            model, tokenizer, processed, config.evaluate, name=name, progress=config.runtime.progress
        )
        del model  # one in memory at a time
        gc.collect()
    reports = workspace.output("reports/evaluate/predictions.jsonl").parent
    write_reports(reports, scores, rows)
    write_provenance(reports, "evaluate", config.evaluate, adapter_sha256=hash_path(adapter))
    scores_and_forgetting = {**scores, "forgetting": forgetting(scores["base"], scores["adapter"])}
    write_json(workspace.output("metrics/evaluate.json"), scores_and_forgetting)
    tracking.record_stage("evaluate", config.runtime, workspace.outputs)


def _load(name: str, config: RunConfig, quantized: Path, adapter: Path, device: torch.device) -> Model:
    keep, attention = config.runtime.keep_quantized, str(config.model.attn_implementation)
    trusts = config.model.trust_remote_code
    if name == "base":
        return load_model(config.model, device)
    if name == "quantized":
        return load_quantized(quantized, config.quantization, device, keep, attention, trusts)
    if config.train.method is TrainMethod.full:
        return load_model_folder(adapter, device, torch_dtype(config.model.dtype), attention, trusts)
    base = load_training_base(config.model, config.quantization, config.train.method, quantized, device, keep)
    return load_adapter(base, adapter)


main = stage(run, "evaluate")

if __name__ == "__main__":
    main()
