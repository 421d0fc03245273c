"""Evaluations of base, quantized base and adapter: each made once for the same model, rows, settings and code."""

import contextlib
import gc
import logging
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.evidence import FILE, Evidence, ModelItems, join_answers, join_items
from pipeline.files import hash_once, hash_path, read_json, write_json, write_jsonl
from pipeline.fingerprint import kept_int8, model_code
from pipeline.imports import code_hash
from pipeline.model_files import hash_model, small_files, weight_bytes
from pipeline.project_models import ProjectModels
from pipeline.provenance import FILE as PROVENANCE
from pipeline.provenance import package_versions, write_provenance
from pipeline.schema import QuantizationMethod, RunConfig
from pipeline.shared_results import find_made, is_being_made, make_once
from pipeline.workspace import Workspace

logger = logging.getLogger(__name__)
MODELS = ("base", "quantized", "adapter")
ITEMS = "items.json"
SCORERS = ("rouge-score", "sacrebleu")
NOT_OF_A_MODEL = ("contamination_ngram", "contamination_share", "harness_tasks", "harness_limit")


def is_plain(config: RunConfig) -> bool:
    """Whether nothing is quantised: `quantized` is then the base."""
    return config.quantization.method is QuantizationMethod.none


def measure(project: ProjectModels, processed: Path) -> tuple[dict[str, ModelItems], bool]:
    """What each of `MODELS` does on the test split and the general text; and whether the adapter was measured anew.

    Raises:
        ConfigError, DataError, ModelError: see `ProjectModels` and `evaluate_model`.
    """
    found: dict[str, ModelItems] = {}
    names = [name for name in MODELS if name != "quantized" or not is_plain(project.config)]
    inputs = {name: _inputs(project, name, processed) for name in names}
    made: list[str] = []
    while names:  # two workers of a sweep come here at once: each first takes what the other is not measuring
        name = next((name for name in names if not is_being_made(_kind(name), inputs[name])), names[0])
        names.remove(name)

        def make(folder: Path, name: str = name) -> None:
            made.append(name)
            write_json(folder / ITEMS, asdict(_measure(project, name, processed)))

        with contextlib.ExitStack() as held:
            folder = make_once(_kind(name), inputs[name], make, held)
            found[name] = ModelItems(**read_json(folder / ITEMS))
        if name not in made:
            logger.info("%s: taken from .training/shared: measured before on these rows", name)
    if is_plain(project.config):
        logger.info("quantized: the base's figures (quantization.method is none)")
    return {name: found.get(name, found["base"]) for name in MODELS}, "adapter" in made


def find_measured(project: ProjectModels, processed: Path) -> dict[str, ModelItems] | None:
    """What `measure` would find; None where it would have to measure anything."""
    folders = {
        name: find_made(_kind(name), _inputs(project, name, processed))
        for name in MODELS
        if name != "quantized" or not is_plain(project.config)
    }
    if None in folders.values():
        return None
    found = {name: ModelItems(**read_json(folder / ITEMS)) for name, folder in folders.items() if folder is not None}
    return {name: found.get(name, found["base"]) for name in MODELS}


def _kind(name: str) -> str:
    return f"evaluation of {name}"


def _measure(project: ProjectModels, name: str, processed: Path) -> ModelItems:
    from pipeline.evaluation import evaluate_model  # torch: not for what is stored
    from pipeline.tokenizer import load_tokenizer

    config, model = project.config, project.load(name)
    tokenizer = load_tokenizer(config.model)
    items = evaluate_model(model, tokenizer, processed, config.evaluate, name=name, progress=config.runtime.progress)
    del model  # one in memory at a time
    gc.collect()
    return items


def _inputs(project: ProjectModels, name: str, processed: Path) -> dict[str, Any]:
    """Everything that decides what a model does on these rows; where it runs changes rounding alone."""
    config = project.config
    evaluate = {key: value for key, value in asdict(config.evaluate).items() if key not in NOT_OF_A_MODEL}
    inputs: dict[str, Any] = {
        "evaluate": evaluate,
        "rows": [hash_once(processed / f"{split}.arrow") for split in ("test", "general")],
        "base": [hash_model(config.model), *small_files(config.model)],
        "model": asdict(config.model),
        "code": code_hash("pipeline.stored_evaluation"),
        "versions": package_versions() | {name: version(name) for name in SCORERS},
        **model_code(config.model),
    }
    if name == "quantized" or (name == "adapter" and project.training_base == "quantized" and not project.is_full):
        inputs["quantized"] = [hash_once(project.find("quantized")), asdict(config.quantization)]
        inputs |= kept_int8(config)
    if name == "adapter":
        inputs["adapter"] = hash_once(project.find("adapter"))
    return inputs


def write_evaluation(
    project: ProjectModels,
    workspace: Workspace,
    models: Mapping[str, ModelItems],
    contamination: Mapping[str, int],
    harness: Mapping[str, Any],
) -> None:
    """Writes metrics/evaluate.json and, in reports/evaluate, items, predictions and where they come from."""
    config = project.config
    folders = {name: project.find("base" if name == "quantized" and is_plain(config) else name) for name in MODELS}
    reports = workspace.output(f"reports/evaluate/{PROVENANCE}").parent
    items = join_items(models)
    write_jsonl(reports / FILE, items)
    write_jsonl(reports / "predictions.jsonl", join_answers({name: found.answers for name, found in models.items()}))
    write_provenance(reports, "evaluate", config.evaluate, adapter_sha256=hash_path(folders["adapter"]))
    evidence = Evidence(items, num_resamples=1)
    metrics = {
        **{name: evidence.values(name) for name in MODELS},
        "forgetting": evidence.forgetting("adapter").difference,
        "contamination": dict(contamination),
        "bytes": {name: weight_bytes(folder) for name, folder in folders.items()},
        "harness": dict(harness),
    }
    write_json(workspace.output("metrics/evaluate.json"), metrics)
