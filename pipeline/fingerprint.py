"""What a training result depends on, as one hash; equal hashes mean the same adapter."""

import dataclasses
import hashlib
import json
from typing import Any

from pipeline.imports import code_hash
from pipeline.provenance import package_versions
from pipeline.schema import RunConfig, TrainMethod


def training_inputs(config: RunConfig, base_hash: str, data_hash: str) -> dict[str, Any]:
    """Everything that changes the trained adapter: settings, data, base, code, versions.

    Machine settings (device, threads) are left out: they change where and how fast, and rounding.

    Args:
        base_hash: of the base that is trained on (the quantized one for QLoRA).
        data_hash: of the processed train and validation splits.
    """
    settings: dict[str, Any] = {"train": dataclasses.asdict(config.train)}
    if config.train.method is not TrainMethod.full:
        settings["lora"] = dataclasses.asdict(config.lora)
    if config.train.method is TrainMethod.qlora:
        settings["quantization"] = dataclasses.asdict(config.quantization)
    settings["model"] = {"dtype": config.model.dtype, "attn_implementation": config.model.attn_implementation}
    return {
        "settings": settings,
        "base": base_hash,
        "data": data_hash,
        "code": code_hash("pipeline.finetuning"),
        "versions": package_versions(),
    }


def fingerprint(inputs: dict[str, Any]) -> str:
    """SHA-256 of the inputs' canonical JSON, in hex."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
