"""What share of an adapter's update is in the merged weights: all of it, or said by name where it is not."""

import csv
import logging
import math
from pathlib import Path

import peft
import pytest
import torch

from pipeline.schema import Dtype
from pipeline.survival import (
    LayerSurvival,
    collect_updates,
    measure_survival,
    summarize,
    warn_if_lost,
    write_survival,
)
from tests.standins import make_model

FORGOTTEN = "model.layers.0.self_attn.v_proj"


def make_adapted(folder: Path, spread: float = 0.02, dtype: torch.dtype = torch.float32, **lora) -> peft.PeftModel:
    """A base whose weights `dtype` holds exactly, in fp32, under an adapter whose B has this standard deviation."""
    base = make_model(folder, "llama3").to(dtype).float()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            if "lora_magnitude" in name:
                parameter.mul_(1.01)
    return adapted.eval()


def lora_layers(model: peft.PeftModel) -> dict[str, peft.tuners.lora.Linear]:
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, peft.tuners.lora.Linear)}


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_all_of_it_survives_in_fp32(tmp_path: Path, lora: dict, caplog: pytest.LogCaptureFixture) -> None:
    model = make_adapted(tmp_path, **lora)
    before = {name: layer.get_base_layer().weight.detach().clone() for name, layer in lora_layers(model).items()}
    updates = collect_updates(model)
    merged = model.merge_and_unload()
    layers = measure_survival(merged, updates)
    assert {layer.layer for layer in layers} == before.keys()
    assert len(layers) == 14
    assert [layer.survival for layer in layers] == pytest.approx([1.0] * 14, abs=1e-4)
    for layer in layers:
        added = merged.get_submodule(layer.layer).weight.detach() - before[layer.layer]
        assert layer.update_norm == pytest.approx(float(added.norm()), rel=1e-4)
        assert layer.base_norm == pytest.approx(float(before[layer.layer].norm()), rel=1e-5)
    warn_if_lost(layers, Dtype.float32)
    assert not caplog.records


def test_one_percent_more_scaling_and_a_forgotten_layer_show(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_adapted(tmp_path)
    updates = collect_updates(model)
    layers = lora_layers(model)
    for layer in layers.values():
        layer.scaling["default"] *= 1.01
    layers[FORGOTTEN].lora_B["default"].weight.data.zero_()
    found = {layer.layer: layer.survival for layer in measure_survival(model.merge_and_unload(), updates)}
    assert found.pop(FORGOTTEN) == pytest.approx(0.0, abs=1e-4)
    assert list(found.values()) == pytest.approx([1.01] * 13, abs=1e-4)


@pytest.mark.parametrize("dtype", [Dtype.bfloat16, Dtype.float16])
def test_a_tiny_update_swallowed_by_the_cast_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: Dtype
) -> None:
    kept_dtype = getattr(torch, dtype)
    model = make_adapted(tmp_path, 1e-6, kept_dtype)
    updates = collect_updates(model)
    layers = measure_survival(model.merge_and_unload().to(kept_dtype), updates)
    assert summarize(layers)["survival_mean"] < 0.5
    warn_if_lost(layers, dtype)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{FORGOTTEN} 0." in record.getMessage()
    assert "Set merge.dtype=float32" in record.getMessage()

    caplog.clear()  # the control: what this dtype resolves is not reported
    model = make_adapted(tmp_path, 0.02, kept_dtype)
    updates = collect_updates(model)
    layers = measure_survival(model.merge_and_unload().to(kept_dtype), updates)
    assert summarize(layers)["survival_min"] == pytest.approx(1.0, abs=0.01)
    warn_if_lost(layers, dtype)
    assert not caplog.records


def test_an_unchanged_layer_is_left_out_of_the_summary(tmp_path: Path) -> None:
    model = make_adapted(tmp_path)
    lora_layers(model)[FORGOTTEN].lora_B["default"].weight.data.zero_()
    updates = collect_updates(model)
    layers = measure_survival(model.merge_and_unload(), updates)
    assert [layer.layer for layer in layers if math.isnan(layer.survival)] == [FORGOTTEN]
    assert summarize(layers)["survival_min"] == pytest.approx(1.0, abs=1e-4)
    assert summarize([]) == {}


def test_table_and_plot(tmp_path: Path) -> None:
    layers = [LayerSurvival(f"model.layers.{i}.mlp.up_proj", 1.0 - 0.1 * i, 0.5, 10.0) for i in range(3)]
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_survival(folder, {"merged": layers, "merged_original": [], "requantized": layers[:2]})
    with (tmp_path / "a" / "survival.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["merged"] * 3 + ["requantized"] * 2
    assert rows[1] == {
        "layer": "model.layers.1.mlp.up_proj",
        "variant": "merged",
        "survival": "0.9",
        "update_norm": "0.5",
        "base_norm": "10.0",
    }
    pictures = [(tmp_path / name / "survival.png").read_bytes() for name in ("a", "b")]
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG")
    write_survival(tmp_path / "full", {"merged": []})
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["survival.csv"]
