"""The plan at the sizes of published figures; docs/memory.md says what each of them counts."""

import dataclasses

import pytest
from transformers import AutoConfig

from pipeline.architecture import read_architecture
from pipeline.config import compose_config
from pipeline.memory import plan_memory, plan_states, setup_of, trainable_parameters, usable_bytes
from pipeline.memory_states import quantized_bytes, quantized_linear

LLAMA = {"model_type": "llama", "vocab_size": 32_000, "tie_word_embeddings": False, "max_position_embeddings": 4096}
LLAMA2_7B = {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_65B = {"hidden_size": 8192, "intermediate_size": 22_016, "num_hidden_layers": 80, "num_attention_heads": 64}
QLORA = [
    "quantization.compute_dtype=bfloat16", "lora.r=64", "train.micro_batch_size=1", "train.gradient_checkpointing=true",
    "train.gradient_accumulation_steps=16", "train.optimizer=paged_adamw_8bit",
]  # fmt: skip


def read(shape):
    return read_architecture(AutoConfig.for_model(**LLAMA, **shape))


def setup(*overrides, length=512, keeps=True):
    return setup_of(compose_config(list(overrides)), "cuda", length=length, keeps_quantized=keeps)


def test_65b_trains_with_qlora_within_48_gb() -> None:
    """QLoRA (arXiv 2305.14314): NF4, double quantization, bf16, r 64 on all linear layers, paged optimizer."""
    model, plan = read(LLAMA_65B), setup(*QLORA)
    assert model.num_parameters == pytest.approx(65.3e9, rel=0.001)
    assert trainable_parameters(model, plan) == pytest.approx(0.8e9, rel=0.01)
    memory = plan_memory(model, plan)
    assert memory.weights + memory.scales == pytest.approx(64.76e9 * 4.127 / 8 + 1.05e9, rel=0.002)
    assert 40e9 < memory.total <= usable_bytes(48 * 10**9, "cuda")
    # controls: what would not have fitted
    whole = dataclasses.replace(plan, keeps_quantized=False)
    long = dataclasses.replace(plan, length=2048, gradient_checkpointing=False)
    assert all(plan_memory(model, each).total > 48e9 for each in (whole, long))


def test_llama_2_7b_in_nf4_with_double_quantization() -> None:
    """3.34 GB of quantised weights and scales (4.127 bits a weight), 0.52 GB of embeddings and head in bf16."""
    model, plan = read(LLAMA2_7B), setup(*QLORA)
    layers = quantized_linear(model, plan.quantization)
    num_weights = sum(layer.num_weights for layer in layers)
    codes, scales = quantized_bytes(layers, plan.quantization)
    assert num_weights == 6_476_005_376
    assert 8 * (codes + scales) / num_weights == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.001)
    assert (codes + scales) / 1e9 == pytest.approx(3.34, abs=0.005)
    memory = plan_states(model, plan)
    assert (memory.weights + memory.scales - codes - scales) / 1e9 == pytest.approx(0.52, abs=0.005)
    single = dataclasses.replace(plan.quantization, double_quant=False)
    assert sum(quantized_bytes(layers, single)) / 1e9 == pytest.approx(6.476 * 4.5 / 8, abs=0.005)


def test_full_fine_tuning_of_7b_takes_16_bytes_a_parameter() -> None:
    """ZeRO (arXiv 1910.02054) counts 2 + 2 + 4 + 4 + 4 in mixed precision; ours are 4 + 4 + 4 + 4 in fp32."""
    memory = plan_states(read(LLAMA2_7B), setup("train.method=full", keeps=False))
    a_parameter = memory.states / 6_738_415_616
    assert a_parameter == pytest.approx(16, abs=0.01)
    assert 7e9 * a_parameter == pytest.approx(112e9, rel=0.001)
    assert memory.weights == memory.gradients == pytest.approx(memory.optimizer / 2, rel=1e-6)
