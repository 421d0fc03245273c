"""Records of trained adapters as the stages leave them, made without training."""

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from pipeline.config import compose_config
from pipeline.files import hash_file, hash_path, write_json, write_jsonl, write_text
from pipeline.schema import RunConfig, RuntimeConfig
from pipeline.tracking_runs import describe_training
from pipeline.workspace import ADAPTER, RUN

FINGERPRINT = "3f2a91" + "0b" * 29
STEPS = (1, 2, 3, 4)
STARTED_AT = 1_700_000_000_000


@functools.cache
def _composed() -> RunConfig:
    return compose_config()


def settings(**changes: Any) -> RunConfig:
    """The project's own settings with some changed: `settings(lora__r=4)`."""
    config = copy.deepcopy(_composed())
    for key, value in changes.items():
        group, name = key.split("__")
        assert hasattr(getattr(config, group), name)
        setattr(getattr(config, group), name, value)
    return config


def tracked(**changes: Any) -> RuntimeConfig:
    runtime = settings(runtime__progress=False).runtime
    for key, value in ({"tracking": True, "system_metrics": False} | changes).items():
        setattr(runtime, key, value)
    return runtime


def make_record(folder: Path, fingerprint: str = FINGERPRINT, loss: float = 1.0, **changes: Any) -> Path:
    """A folder that holds what train, evaluate, merge and gate write for one adapter."""
    dataset = {"name": "contracts-train", "digest": "d" * 16, "context": "training", "num_rows": 9, "source": "assets"}
    run = describe_training(settings(**changes), fingerprint, {"data": "1", "base": "2", "code": "3"}, [dataset])
    dataclasses.replace(run, started_at=STARTED_AT).save(folder / RUN)
    write_text(folder / ADAPTER / "adapter_config.json", json.dumps({"r": 8}))
    write_text(folder / ADAPTER / "adapter_model.safetensors", f"weights of {fingerprint} {loss}")
    history = [{"step": step, "train.loss": loss + 1 / step, "train.learning_rate": 0.005} for step in STEPS]
    write_jsonl(folder / "reports/train/history.jsonl", [*history, {"step": 4, "validation.loss": loss}])
    write_text(folder / "reports/train/curves.csv", "step,train.loss\n")
    metrics = {"validation_loss": loss, "num_steps": 4, "duration_seconds": 2.0, "method": "qlora", "flat_loss": False}
    write_json(folder / "metrics/train.json", metrics)
    make_measurements(folder, loss)
    return folder


def make_measurements(folder: Path, loss: float) -> None:
    adapter_sha256 = hash_path(folder / ADAPTER)
    scores = {"base": {"loss": 3.0, "bleu": None}, "adapter": {"loss": loss, "exact_match": 0.5}, "forgetting": 0.1}
    write_json(folder / "metrics/evaluate.json", scores)
    write_jsonl(folder / "reports/evaluate/predictions.jsonl", [{"row": n} for n in range(250)])
    made = {"settings": {"evaluate": {"max_rows": 50}}, "adapter_sha256": adapter_sha256}
    write_json(folder / "reports/evaluate/provenance.json", made)
    write_json(folder / "metrics/merge.json", {"merged": {"loss": loss}, "mean_kl": 1e-9, "merge_base": "dequantized"})
    made = {"settings": {"merge": {"dtype": "float32"}}, "adapter_sha256": adapter_sha256}
    write_json(folder / "models/merged/provenance.json", made)
    inputs = [[name, hash_file(folder / name)] for name in ("metrics/evaluate.json", "metrics/merge.json")]
    write_json(folder / "metrics/gate.json", {"passed": True, "conditions": [], "inputs": inputs})
