"""A model's sizes from its config.json alone."""

import pytest
import torch
from transformers import AutoConfig

from pipeline.architecture import read_architecture
from pipeline.errors import ModelError

LLAMA2_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "vocab_size": 32_000,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def read(**config):
    return read_architecture(AutoConfig.for_model(**config))


def test_llama_2_7b_has_the_parameters_that_its_paper_counts() -> None:
    architecture = read(**LLAMA2_7B)
    assert architecture.num_parameters == 6_738_415_616
    assert sum(layer.num_weights for layer in architecture.linear) == 6_476_005_376
    assert architecture.embedding_parameters == architecture.head_parameters == 32_000 * 4096
    assert architecture.other_parameters == (2 * 32 + 1) * 4096
    assert len(architecture.linear) == 7 * 32
    assert architecture.max_context == 4096


def test_a_tied_head_counts_once_and_conv1d_is_not_quantizable() -> None:
    architecture = read(model_type="gpt2")
    assert architecture.num_parameters == 124_439_808
    assert architecture.head_parameters == 0
    first = architecture.linear[0]
    assert (first.path, first.in_features, first.out_features) == ("transformer.h.0.attn.c_attn", 768, 2304)
    assert first.has_bias
    assert not any(layer.is_quantizable for layer in architecture.linear)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 16},
        {"model_type": "qwen2", "num_key_value_heads": 8},
        {"model_type": "gemma", "head_dim": 32},
        {"model_type": "gpt_neox"},
    ],
)
def test_the_parts_add_up_to_a_real_model(config) -> None:
    from transformers import AutoModelForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "vocab_size": 300,
    }
    architecture = read(**config, **sizes)
    model = AutoModelForCausalLM.from_config(architecture.config)
    assert architecture.num_parameters == sum(p.numel() for p in model.parameters())
    linear = {
        n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear and m is not model.get_output_embeddings()
    }
    assert {layer.path: (layer.in_features, layer.out_features) for layer in architecture.linear} == {
        name: (module.in_features, module.out_features) for name, module in linear.items()
    }
    assert architecture.largest_parameter == max(p.numel() for p in model.parameters())


def test_no_memory_is_taken() -> None:
    architecture = read(**LLAMA2_7B | {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 22_016})
    assert all(parameter.is_meta for parameter in architecture.model.parameters())


def test_what_is_no_causal_language_model_is_refused() -> None:
    with pytest.raises(ModelError, match="makes no causal language model"):
        read(model_type="vit")
