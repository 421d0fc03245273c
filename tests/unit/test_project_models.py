"""Each model by its name is itself, and refused where it was made of something else."""

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.config import compose_config
from pipeline.dataset import load_split
from pipeline.errors import ConfigError, DataError, ModelError
from pipeline.files import hash_path, write_json
from pipeline.lora import load_adapter
from pipeline.modeling import load_model, load_model_folder
from pipeline.project_models import MODELS, ProjectModels, check_adapter
from pipeline.provenance import write_provenance
from pipeline.quantization import load_quantized, load_training_base, quantize
from pipeline.workspace import ADAPTER, MERGED, QUANTIZED, Workspace
from tests.small_project import make_adapter, make_project, overrides
from tests.standins import CPU, write_processed

QLORA = ("train=qlora", "quantization=nf4", "merge=training")
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """With `models/quantized`, and in `qlora` an adapter that was trained on it."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    config = compose_config(overrides(folder, *QLORA))
    validation = load_split(write_processed(folder / "processed"), "validation")
    quantize(config.model, config.quantization, validation, folder / QUANTIZED, CPU)
    make_adapter(folder / "qlora" / ADAPTER, config, 3, folder / QUANTIZED)
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    shutil.copytree(made / "models", tmp_path / "models")
    return tmp_path


def project(made: Path, folder: Path, *more: str) -> ProjectModels:
    return ProjectModels(compose_config(overrides(made, *more)), Workspace(folder, folder), CPU)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_each_name_is_the_model_that_it_says(made):
    found = project(made, made, "quantization=nf4")  # a lora adapter, with a quantized base beside it
    config, quantized = found.config, made / QUANTIZED
    expected = {
        "base": load_model(config.model, CPU),
        "quantized": load_quantized(quantized, config.quantization, CPU),
        "adapter": load_adapter(load_model(config.model, CPU), made / ADAPTER),
        "merged": load_model_folder(made / MERGED, CPU, torch.float32),
    }
    scores = {name: logits(model) for name, model in expected.items()}
    assert all(torch.equal(logits(found.load(name)), scores[name]) for name in MODELS)
    assert len({float(score.sum()) for score in scores.values()}) == 4


def test_a_qlora_adapter_is_loaded_on_the_quantized_base(made):
    """As `load_training_base` has it in training."""
    found = project(made, made, *QLORA)
    config, adapter = found.config, made / "qlora" / ADAPTER
    base = load_training_base(config.model, config.quantization, config.train.method, made / QUANTIZED, CPU)
    loaded = logits(found.load("adapter", {"default": adapter}))
    assert torch.equal(loaded, logits(load_adapter(base, adapter)))
    assert not torch.equal(loaded, logits(load_adapter(load_model(config.model, CPU), adapter)))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("quantized", ["quantization=nf4", "quantization.blocksize=128"], "blocksize: made with 64, now 128"),
        ("quantized", [], "quantization.method is none, so this is the base"),
        ("adapter", ["lora.r=4"], "lora.r: made with 2, now 4"),
        ("adapter", ["train.learning_rate=0.5"], "learning_rate: made with"),
        ("adapter", ["model.dtype=bfloat16"], "model.dtype: made with 'float32', now"),
        ("merged", ["merge.dtype=bfloat16"], "dtype: made with"),
    ],
)
def test_what_was_made_with_other_settings_is_refused(made, folder, name, changes, message):
    with pytest.raises(ConfigError, match=message):
        project(made, folder, *changes).load(name)
    right = changes[:1] if changes[:1] == ["quantization=nf4"] else []
    if "none" not in message:
        assert project(made, folder, *right).find(name).is_dir()


def test_a_merged_model_is_of_the_adapter_beside_it(made, folder, monkeypatch):
    monkeypatch.chdir(folder)  # not where this project may have an adapter of its own
    assert project(made, folder).find("merged") == folder / MERGED
    shutil.copy(made / "runs/other/adapter_model.safetensors", folder / ADAPTER)
    with pytest.raises(ConfigError, match=f"{MERGED}: merged from another adapter than {folder / ADAPTER}. Run `dvc"):
        project(made, folder).load("merged")
    merge = project(made, folder).config.merge
    write_provenance(folder / MERGED, "merge", merge, adapter_sha256=hash_path(folder / ADAPTER))
    assert project(made, folder).find("merged") == folder / MERGED
    shutil.rmtree(folder / ADAPTER)  # pulled by itself
    assert project(made, folder).find("merged") == folder / MERGED


def test_what_is_not_there_is_named(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, path in (("adapter", ADAPTER), ("merged", MERGED)):
        with pytest.raises(DataError, match=f"{path}: not found"):
            project(made, tmp_path).load(name)


def test_a_named_adapter_needs_this_base_and_no_more(made, tmp_path, caplog):
    """Of other LoRA and training settings it may be; of another base, method or system prompt not."""
    config = compose_config(overrides(made, "lora.r=4", "train.learning_rate=0.5"))
    check_adapter(made / ADAPTER, config)
    assert not caplog.text
    changes = ["model.dtype=bfloat16", "train=full", "data.system_prompt=Shout."]
    for change, error in zip(changes, (ConfigError, ModelError, ConfigError), strict=True):
        with pytest.raises(error, match=str(made / ADAPTER)):
            check_adapter(made / ADAPTER, compose_config(overrides(made, change)))
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    check_adapter(tmp_path, config)
    assert "nothing tells which base" in caplog.text
