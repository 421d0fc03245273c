"""The quantize and merge stages on the settings of conf/, from the files they declare to the files they declare."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config import compose_config
from pipeline.errors import ConfigError
from pipeline.lora import attach_lora, save_adapter
from pipeline.provenance import write_provenance
from pipeline.quantization import load_training_base
from pipeline.schema import RunConfig
from pipeline.workspace import Workspace
from stages import merge, quantize
from tests.standins import CPU, ROOT, make_model, write_processed

KEYS = {
    "max_abs_logit_diff",
    "mean_kl",
    "top1_agreement",
    "merge_base",
    "cast_loss_difference",
    "merged",
    "parity_num_tokens",
}


def settings(folder: Path, *overrides: str) -> RunConfig:
    fixed = [
        "model=local", f"model.path={folder / 'base'}", "runtime.tracking=false", "runtime.progress=false",
        "runtime.device=cpu", "evaluate.generate=false", "evaluate.batch_size=4", "merge.parity_num_tokens=300",
        "lora.r=4",
    ]  # fmt: skip
    return compose_config([*fixed, *overrides])


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    make_model(tmp_path / "base")
    config = settings(tmp_path)
    write_provenance(write_processed(tmp_path / "data" / "processed"), "prepare", config.data, config.model)
    return Workspace(tmp_path, tmp_path)


def write_adapter(folder: Path, config: RunConfig) -> None:
    """What the train stage leaves: an adapter whose B is not zero, and its provenance."""
    base = load_training_base(config.model, config.quantization, config.train.method, folder / "models/quantized", CPU)
    model = attach_lora(base, config.lora)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    target = folder / "models/adapter"
    save_adapter(model, target)
    write_provenance(target, "train", config.train, config.lora, config.quantization, config.model, config.data)


def test_quantize_then_merge(workspace: Workspace) -> None:
    folder = workspace.outputs
    config = settings(folder)
    quantize.run(config, workspace)
    metrics = json.loads((folder / "metrics/quantize.json").read_text())
    assert metrics["bytes_after"] < metrics["bytes_before"]
    assert metrics["quantized"]["num_tokens"] == metrics["base"]["num_tokens"] > 0
    with (folder / "reports/quantize/layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == metrics["num_quantized_layers"] == 14
    assert max(float(row["relative_error"]) for row in rows) == pytest.approx(metrics["relative_error_max"], abs=1e-6)

    write_adapter(folder, config)
    merge.run(config, workspace)
    result = json.loads((folder / "metrics/merge.json").read_text())
    assert result.keys() >= KEYS
    assert result["merged"].keys() >= {"loss", "perplexity", "num_tokens"}
    assert result["merge_base"] == "dequantized"
    assert result["parity_num_tokens"] >= 300
    assert AutoModelForCausalLM.from_pretrained(folder / "models/merged").dtype is torch.float32


def test_quantize_none_declares_the_same_files(workspace: Workspace) -> None:
    quantize.run(settings(workspace.outputs, "quantization=none", "train=lora"), workspace)
    folder = workspace.outputs
    assert json.loads((folder / "metrics/quantize.json").read_text()) == {"method": "none"}
    assert (folder / "reports/quantize/layers.csv").read_text().count("\n") == 1
    assert [p.name for p in (folder / "models/quantized").iterdir()] == ["provenance.json"]


def test_merge_refuses_an_adapter_of_other_settings(workspace: Workspace) -> None:
    config = settings(workspace.outputs)
    quantize.run(config, workspace)
    write_adapter(workspace.outputs, config)
    with pytest.raises(ConfigError, match=r"lora\.r: made with 4, now 8"):
        merge.run(settings(workspace.outputs, "lora.r=8"), workspace)
    with pytest.raises(ConfigError, match=r"quantization\.blocksize: made with 64, now 128"):
        merge.run(settings(workspace.outputs, "quantization.blocksize=128"), workspace)


def test_a_broken_base_ends_in_one_message_and_no_traceback(workspace: Workspace) -> None:
    folder = workspace.outputs
    (folder / "base" / "model.safetensors").rename(folder / "base" / "pytorch_model.bin")
    command = [
        sys.executable, "-m", "stages.quantize", "model=local", f"model.path={folder / 'base'}", "runtime.device=cpu",
        f"runtime.inputs_dir={folder}", f"runtime.output_dir={folder / 'out'}", "runtime.progress=false",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "pickle weights only (pytorch_model.bin)" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    assert not (folder / "out" / "models" / "quantized").exists()
