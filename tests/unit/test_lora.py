"""Attaching, saving and loading adapters."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlamaForCausalLM

from pipeline.config import compose_config
from pipeline.errors import ConfigError, ModelError
from pipeline.files import hash_path
from pipeline.lora import attach_lora, load_adapter, resolve_target_modules, save_adapter

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
MLP = ["down_proj", "gate_proj", "up_proj"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", ATTENTION),
        ("mlp", MLP),
        ("all_linear", sorted(ATTENTION + MLP)),
        (["v_proj", "q_proj"], ["q_proj", "v_proj"]),
    ],
)
def test_named_sets_and_names(tiny_llama: LlamaForCausalLM, targets: str | list[str], expected: list[str]) -> None:
    assert resolve_target_modules(tiny_llama, targets) == expected


def test_every_name_must_match(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match=r"'c_attn' matches no linear module; this model has q_proj, k_proj") as error:
        resolve_target_modules(tiny_llama, ["q_proj", "c_attn"])
    assert "'q_proj'" not in str(error.value).split("matches")[0]


def test_the_vision_tower_gets_no_adapter() -> None:
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16}  # fmt: skip
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1))
    adapted = attach_lora(model, compose_config(["lora.r=2"]).lora)
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert names
    assert not [name for name in names if "vision" in name]


def test_a_rank_over_the_width_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match=r"lora.r: 64 is over the width"):
        attach_lora(tiny_llama, compose_config(["lora.r=64", "lora.target_modules=attention"]).lora)


@pytest.mark.parametrize("overrides", [[], ["lora.use_rslora=true"], ["lora.use_dora=true"], ["lora.bias=lora_only"]])
def test_saved_and_loaded_gives_the_same_logits(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, overrides: list[str]
) -> None:
    settings = compose_config(["lora.r=4", *overrides]).lora
    state = {k: v.clone() for k, v in tiny_llama.state_dict().items()}
    model = attach_lora(tiny_llama, settings, "assets/base")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(3, 23)[None]
    expected = model.eval()(input_ids=ids).logits
    save_adapter(model, tmp_path / "a")
    base = LlamaForCausalLM(tiny_llama.config)
    base.load_state_dict(state)
    before = base.eval()(input_ids=ids).logits
    loaded = load_adapter(base, tmp_path / "a")
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
    assert (expected - before).abs().max() > 1e-2
    assert not any(p.requires_grad for p in loaded.parameters())


def test_equal_adapters_give_equal_bytes_and_no_path(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model = attach_lora(tiny_llama, compose_config([]).lora, "assets/base")
    save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == "assets/base"
    model.peft_config["default"].target_modules = set(reversed(sorted(config["target_modules"])))
    save_adapter(model, tmp_path / "b")
    assert hash_path(tmp_path / "a") == hash_path(tmp_path / "b")


def test_an_adapter_with_nan_or_of_another_base_is_refused(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in tiny_llama.state_dict().items()}
    model = attach_lora(tiny_llama, compose_config([]).lora)
    next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] = float("nan")
    save_adapter(model, tmp_path / "nan")
    base = LlamaForCausalLM(tiny_llama.config)
    base.load_state_dict(state)
    with pytest.raises(ModelError, match="NaN"):
        load_adapter(base, tmp_path / "nan")
    other = tiny_llama.config.to_dict() | {"hidden_size": 32, "intermediate_size": 64}
    with pytest.raises(ModelError, match="does not fit this base"):
        load_adapter(LlamaForCausalLM(type(tiny_llama.config)(**other)), tmp_path / "nan")
    with pytest.raises(ModelError, match="no adapter_model"):
        load_adapter(base, tmp_path)
