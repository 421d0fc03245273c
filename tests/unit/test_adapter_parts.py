"""Ranks and scalings of single layers, and modules that train whole: named right, trained, saved, merged, or refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from pipeline.architecture import read_architecture
from pipeline.config import compose_config
from pipeline.dataset import load_split
from pipeline.errors import ConfigError
from pipeline.finetuning import prepare
from pipeline.lora import attach_adapter, load_adapter
from pipeline.memory import plan_memory, setup_of, trainable_parameters
from pipeline.quantization import load_training_base, quantize
from pipeline.schema import Dtype, KeepQuantized, RunConfig
from pipeline.training import Trainer
from tests.standins import CPU, make_model, model_config, quantization_config, write_processed
from tests.trained import merge_and_reload


def lora_of(**changes: object):
    return dataclasses.replace(compose_config(["lora.r=4"]).lora, **changes)


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids)).logits.float()


def test_each_layer_gets_its_own_rank_and_scaling(tiny_llama: LlamaForCausalLM) -> None:
    lora = lora_of(
        rank_pattern={"down_proj": 6, r"layers\.0\..*": 2}, alpha_pattern={r"layers\.1\.self_attn.q_proj": 20}
    )
    layers = attach_adapter(tiny_llama, lora).base_model.model.model.layers
    ranks = [layer.r["default"] for x in layers for layer in (x.mlp.down_proj, x.mlp.up_proj, x.self_attn.q_proj)]
    assert ranks == [6, 2, 2, 6, 4, 4]  # the first key that matches decides
    assert [x.mlp.down_proj.lora_A["default"].weight.shape for x in layers] == [(6, 128), (6, 128)]
    scalings = [x.self_attn.q_proj.scaling["default"] for x in layers]
    assert scalings == [8 / 2, 20 / 4]
    with pytest.raises(ConfigError, match=r"New keys take a plus: \+lora.rank_pattern"):
        compose_config(["lora.rank_pattern={q_proj: 2}"])
    assert compose_config(["+lora.rank_pattern={q_proj: 2}"]).lora.rank_pattern == {"q_proj": 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank_pattern": {"c_attn": 2}}, "lora.rank_pattern: 'c_attn' matches no layer of the adapter; .*q_proj"),
        ({"alpha_pattern": {"proj": 2.0}}, "lora.alpha_pattern: 'proj' matches no layer"),
        ({"rank_pattern": {"lm_head": 2}}, "'lm_head' matches no layer"),
        ({"rank_pattern": {".*": 2, "q_proj": 3}}, "'q_proj' matches only layers that an earlier key matches"),
        ({"rank_pattern": {"k_proj": 33}}, "33 is over the width of model.layers.0.self_attn.k_proj, 32"),
        ({"modules_to_save": ["c_attn"]}, "'c_attn' matches no module; this model has embed_tokens, q_proj.*norm"),
        ({"modules_to_save": ["lm_head"]}, "lm_head shares its weights with model.embed_tokens .tied.*model.new_tokens"),
        ({"modules_to_save": ["embed_tokens"]}, "model.embed_tokens shares its weights with lm_head"),
        ({"modules_to_save": ["down_proj"]}, "model.layers.0.mlp.down_proj has an adapter .*lora.target_modules"),
        ({"modules_to_save": ["layers.1.mlp"]}, "model.layers.1.mlp has an adapter .on model.layers.1.mlp.gate_proj"),
        ({"modules_to_save": ["act_fn"]}, "act_fn has no weights"),
    ],
)  # fmt: skip
def test_what_the_model_does_not_have_is_refused(tiny_llama: LlamaForCausalLM, changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attach_adapter(tiny_llama, lora_of(**changes))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["+lora.rank_pattern={q_proj: 0}"], "'q_proj' is 0; it must be 1 or more"),
        (["+lora.alpha_pattern={q_proj: 0}"], "'q_proj' is 0; it must be over 0"),
        (["+lora.rank_pattern={'q_proj(': 2}"], "is no regular expression"),
        (["+lora.rank_pattern={'(?i)q_proj': 2}"], "is no regular expression"),
        (["lora.modules_to_save=[norm,norm]"], "one twice"),
        (["lora.modules_to_save=[norm]", "runtime.engine=fsdp", "runtime.num_processes=2"], "set runtime=ddp"),
    ],
)
def test_wrong_values_are_refused_before_anything_loads(overrides: list[str], said: str) -> None:
    if "(" in overrides[0]:  # no override can say so: a file can
        config = compose_config([])
        from pipeline.lora_rules import lora_problems

        config.lora.rank_pattern = {"q_proj(": 2}
        assert any(said in line for line in lora_problems(config))
        return
    with pytest.raises(ConfigError, match=said):
        compose_config(overrides)


def test_the_plan_knows_parts_of_layers_that_its_simulation_leaves_out() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 300}
    architecture = read_architecture(AutoConfig.for_model("llama", num_hidden_layers=7, **sizes))
    config = compose_config(["train=lora", "quantization=none", "lora.r=4"])
    config.lora.rank_pattern = {r"layers\.5\..*": 9, r"layers\.0\..*": 2}
    config.lora.modules_to_save = ["layers.6.input_layernorm", "norm"]
    plan = setup_of(config, "cpu", length=64, keeps_quantized=False)
    model = attach_adapter(AutoModelForCausalLM.from_config(architecture.config), config.lora)
    assert trainable_parameters(architecture, plan) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan_memory(architecture, plan).activations > 0
    config.lora.rank_pattern = {r"layers\.7\..*": 9}  # the negative control: no such layer
    with pytest.raises(ConfigError, match="matches no layer"):
        plan_memory(architecture, plan)


def configured(folder: Path, method: str, skip: list[str] | None = None, **lora: object) -> RunConfig:
    config = compose_config([f"train={method}", *(["quantization=none"] if method == "lora" else []), "lora.r=4"])
    changes = {"max_steps": 6, "eval_steps": 3, "micro_batch_size": 4, "keep": "last", "learning_rate": 1e-2}
    return dataclasses.replace(
        config,
        model=model_config(folder / "base"),
        quantization=quantization_config(skip_modules=skip or []),
        train=dataclasses.replace(config.train, **changes),
        lora=dataclasses.replace(config.lora, **lora),
    )


def load(config: RunConfig, folder: Path, keep: KeepQuantized = KeepQuantized.never):
    return load_training_base(config.model, config.quantization, config.train.method, folder / "quantized", CPU, keep)


def make(folder: Path, method: str, kind: str = "llama3", skip: list[str] | None = None, **lora: object) -> RunConfig:
    make_model(folder / "base", kind)
    write_processed(folder / "processed")
    config = configured(folder, method, skip, **lora)
    if method == "qlora":
        validation = load_split(folder / "processed", "validation")
        quantize(config.model, config.quantization, validation, folder / "quantized", CPU)
    return config


def train(config: RunConfig, folder: Path, keep: KeepQuantized = KeepQuantized.never) -> torch.nn.Module:
    split = load_split(folder / "processed", "train")
    torch.manual_seed(0)
    prepared = prepare(load(config, folder, keep), config, split, 0)
    Trainer(prepared.model, split, split, config.train, 0, lambda *_: None, progress_bar=False).run()
    prepared.finish(folder / "adapter")
    return prepared.model.eval()


CASES = {
    "patterns": {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"q_proj": 20.0}},
    "patterns rslora": {"rank_pattern": {"down_proj": 6}, "use_rslora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
}


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("case", CASES)
def test_they_train_and_are_saved_loaded_and_merged(tmp_path: Path, method: str, case: str) -> None:
    config = make(tmp_path, method, **CASES[case])
    model = train(config, tmp_path)
    expected, base = logits(model), load(config, tmp_path)
    whole = {name.replace(".modules_to_save.default", "") for name, p in model.named_parameters() if "to_save" in name}
    assert {name.split(".")[-2] for name in whole} == set(CASES[case].get("modules_to_save", []))
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert saved["rank_pattern"] == CASES[case].get("rank_pattern", {})
    assert torch.equal(logits(load_adapter(load(config, tmp_path), tmp_path / "adapter")), expected)
    merged = merge_and_reload(tmp_path, config)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-3)
    for name in whole:  # the negative control: they did train
        path = name.removeprefix("base_model.model.")
        assert not torch.equal(merged.get_parameter(path), base.get_parameter(path))


@pytest.mark.parametrize("keep", [KeepQuantized.always, KeepQuantized.never])
def test_what_lies_in_few_bits_does_not_train(tmp_path: Path, keep: KeepQuantized) -> None:
    lora = {"modules_to_save": ["layers.1.mlp"], "target_modules": "attention"}
    config = make(tmp_path, "qlora", **lora)
    with pytest.raises(ConfigError, match=r"holds model.layers.1.mlp.down_proj in few bits.*add down_proj to quanti"):
        train(config, tmp_path, keep)


def test_what_quantization_skips_trains_whole_on_a_base_in_few_bits(tmp_path: Path) -> None:
    lora = {"modules_to_save": ["layers.1.mlp"], "target_modules": "attention"}
    config = make(tmp_path, "qlora", skip=["layers.1.mlp"], **lora)
    expected = logits(train(config, tmp_path, KeepQuantized.always))
    loaded = load_adapter(load(config, tmp_path, KeepQuantized.always), tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("modules", [["lm_head"], ["norm"], ["embed_tokens"]])
def test_on_a_sixteen_bit_base_they_train_in_their_own_dtype(tmp_path: Path, modules: list[str]) -> None:
    config = make(tmp_path, "lora", modules_to_save=modules)
    config.model.dtype = Dtype.bfloat16
    model = train(config, tmp_path)
    trained = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    assert {p.dtype for p in trained} == {torch.float32}
    assert model(torch.tensor([[5, 3]])).logits.dtype is torch.bfloat16
    loaded = load_adapter(load(config, tmp_path), tmp_path / "adapter")
    assert (logits(loaded) - logits(model)).abs().max() < 0.05 * logits(model).abs().max()
