"""Adapters mixed in a batch or swapped on one base answer as each alone; each model is itself."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from pipeline import quantization
from pipeline.config import compose_config
from pipeline.dataset import load_split
from pipeline.errors import ConfigError
from pipeline.generation import TextStreamer, answer_text, generate_answers, generate_with_adapters, mixes_adapters
from pipeline.project_models import ProjectModels
from pipeline.prompts import Prompt
from pipeline.provenance import write_provenance
from pipeline.schema import Bias, RunConfig
from pipeline.side_by_side import Column, Models, Sampling, Session
from pipeline.tokenizer import load_tokenizer
from pipeline.workspace import ADAPTER, MERGED, QUANTIZED, Workspace
from tests.small_project import make_adapter, make_project, overrides, watch_loads
from tests.standins import CPU, write_processed

SETTINGS = {"stop_ids": [258], "pad_token_id": 256, "max_new_tokens": 8, "batch_size": 8, "context": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


def project(folder: Path, config: RunConfig | None = None) -> ProjectModels:
    return ProjectModels(config or compose_config(overrides(folder)), Workspace(folder, folder), CPU)


def prompts(lengths: list[int]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 250, length).astype(np.int32) for length in lengths]


def test_a_mixed_batch_answers_as_each_adapter_alone(folder):
    model = project(folder).load("adapter", {"default": folder / ADAPTER, "adapter_1": folder / "runs/other"})
    assert mixes_adapters(model)
    asked = prompts([3, 17, 8, 9, 30, 5])
    adapters = ["default", "adapter_1", None, "default", None, "adapter_1"]
    alone = {
        name: generate_with_adapters(model, asked, [name] * 6, **SETTINGS) for name in (None, "default", "adapter_1")
    }
    assert all(len({tuple(answers[i].ids) for answers in alone.values()}) == 3 for i in range(6))  # else a mix-up hides
    brought = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=50.0, eos_token_id=[5])
    model.get_base_model().generation_config = brought  # peft hands it on in a way of its own
    for batch_size in (2, 6):
        mixed = generate_with_adapters(model, asked, adapters, **SETTINGS | {"batch_size": batch_size})
        assert mixed == [alone[name][i] for i, name in enumerate(adapters)]
    assert model.get_base_model().generation_config is brought
    swapped = generate_with_adapters(model, asked, ["adapter_1"] * 6, **SETTINGS)
    assert swapped == alone["adapter_1"] != alone["default"]


def test_adapters_that_peft_cannot_mix_are_swapped(folder, tmp_path):
    make_adapter(tmp_path / "dora", compose_config(overrides(folder)), 3, use_dora=True)
    adapters = {"default": folder / ADAPTER, "adapter_1": tmp_path / "dora"}
    model, asked = project(folder).load("adapter", adapters), prompts([3, 17, 8])
    with pytest.raises(ValueError, match="DoRA"):
        generate_answers(model, asked, adapter_names=["default", "adapter_1", "__base__"], **SETTINGS)
    model = project(folder).load("adapter", adapters)
    assert not mixes_adapters(model)
    names = ["default", "adapter_1", None]
    alone = {name: generate_with_adapters(model, asked, [name] * 3, **SETTINGS) for name in names}
    assert len({tuple(answers[0].ids) for answers in alone.values()}) == 3
    assert generate_with_adapters(model, asked, names, **SETTINGS) == [alone[name][i] for i, name in enumerate(names)]


def test_qlora_answers_on_the_quantized_base(folder, tmp_path, monkeypatch):
    (tmp_path / "base").symlink_to(folder / "base")
    config = compose_config(overrides(tmp_path, "train=qlora", "quantization=nf4"))
    validation = load_split(write_processed(tmp_path / "processed"), "validation")
    quantization.quantize(config.model, config.quantization, validation, tmp_path / QUANTIZED, CPU)
    make_adapter(tmp_path / ADAPTER, config, 1, tmp_path / QUANTIZED)
    models = Models(project(tmp_path, config), ["base", "quantized", "adapter"])
    assert models.columns == [
        Column("base", "base"), Column("quantized", "adapter"), Column("adapter", "adapter", "default"),
    ]  # fmt: skip
    row = Prompt("a:1", "", prompts([9])[0], 258, "base")
    assert [column.name for column in models.columns_for(row)] == ["base", "quantized"]
    tokenizer = load_tokenizer(config.model)
    loads = watch_loads(monkeypatch)
    (answers,) = Session(models, tokenizer, 128, Sampling(8, 8), False).answer([dataclasses.replace(row, adapter=None)])
    assert loads == [tmp_path / "base", tmp_path / QUANTIZED]
    kept = quantization.load_quantized(tmp_path / QUANTIZED, config.quantization, CPU)
    assert generate_answers(kept, [row.ids], **SETTINGS) == [answers["quantized"]]
    assert len({tuple(answer.ids) for answer in answers.values()}) == 3


def test_the_base_of_an_adapter_with_biases_is_loaded_by_itself(folder, tmp_path):
    models = Models(project(folder), ["base", "adapter"])
    assert [column.source for column in models.columns] == ["adapter", "adapter"]
    make_adapter(tmp_path / "biased", compose_config(overrides(folder)), 4, bias=Bias.all)
    models = Models(project(folder), ["base", "adapter"], [tmp_path / "biased"])
    assert [column.source for column in models.columns] == ["base", "adapter"]


def test_a_merged_model_of_another_adapter_is_left_out_and_refused_by_name(folder, tmp_path, caplog):
    assert [column.name for column in Models(project(folder)).columns] == ["base", "adapter", "merged"]
    assert not caplog.text
    for name in ("base", ADAPTER, MERGED):
        shutil.copytree(folder / name, tmp_path / name)
    config = compose_config(overrides(tmp_path))
    config.model.path = str(folder / "base")  # what the adapter's provenance says
    write_provenance(tmp_path / MERGED, "merge", config.merge, adapter_sha256="0")
    assert [column.name for column in Models(project(tmp_path, config)).columns] == ["base", "adapter"]
    assert f"left out: {tmp_path / MERGED}: merged from another adapter" in caplog.text
    with pytest.raises(ConfigError, match="merged from another adapter"):
        Models(project(tmp_path, config), ["merged"])


def test_text_comes_as_tokens_come_and_adds_up_to_the_answer(folder):
    tokenizer = load_tokenizer(compose_config(overrides(folder)).model)
    pieces: list[str] = []
    ids = tokenizer("  Zürich\n  ist 東", add_special_tokens=False)["input_ids"]
    streamer = TextStreamer(tokenizer, [ord("!")], pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token_id in [*ids, ord("!")]:
        streamer.put(torch.tensor([token_id]))
    assert "".join(pieces) == "Zürich\n  ist 東" == answer_text(tokenizer, ids)
    assert len(pieces) > 8
    assert not any("\ufffd" in piece for piece in pieces)
    assert "\ufffd" in tokenizer.decode(ids[:4])  # what would be shown of half a character
