"""A model's layers and sizes from its config.json alone, without weights: built on torch's meta device."""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.errors import ModelError
from pipeline.lora import linear_modules
from pipeline.modeling import quiet_transformers


@dataclass(frozen=True)
class LinearLayer:
    """Attributes:
    path: dotted name in the model, such as `model.layers.0.mlp.down_proj`.
    is_quantizable: bitsandbytes has a layer for it (`nn.Linear`; not transformers' `Conv1D`).
    """

    path: str
    in_features: int
    out_features: int
    has_bias: bool
    is_quantizable: bool

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class Architecture:
    """What memory and FLOPs follow from. Parameters are counted once where they are tied.

    Attributes:
        linear: every linear layer of the language model but the output head.
        embedding_parameters: of tokens and positions.
        head_parameters: 0 where the head is tied to the embeddings.
        other_parameters: norms, biases, and what is no linear layer (experts in one tensor).
        largest_parameter: weights of the largest tensor.
        max_context: positions that it was made for; None where the config sets no limit.
        config: of the language model, as transformers reads it.
    """

    name: str
    num_parameters: int
    linear: tuple[LinearLayer, ...]
    embedding_parameters: int
    head_parameters: int
    other_parameters: int
    largest_parameter: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int | None
    config: PreTrainedConfig = field(compare=False, repr=False)
    trust_remote_code: bool = field(default=False, compare=False)

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The whole model on the meta device: shapes and names, no memory."""
        return meta_model(self.config, self.trust_remote_code)


def read_architecture(config: PreTrainedConfig, name: str = "", trust_remote_code: bool = False) -> Architecture:
    """The architecture of a config.json; of a multimodal one the language model's.

    Raises:
        ModelError: it makes no causal language model.
    """
    text = config.get_text_config()
    model = meta_model(text, trust_remote_code)
    modules = dict(model.named_modules())
    linear = tuple(_linear_layer(path, modules[path]) for path in linear_modules(model))
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = head is None or head.weight is embeddings.weight
    num_parameters = sum(p.numel() for p in model.parameters())
    num_linear = sum(layer.num_weights for layer in linear)
    num_embedding = sum(module.weight.numel() for module in modules.values() if isinstance(module, nn.Embedding))
    num_head = 0 if is_tied else head.weight.numel()
    heads = text.num_attention_heads
    widest = max((layer.out_features for layer in linear), default=text.hidden_size)
    architecture = Architecture(
        name=name or type(model).__name__,
        num_parameters=num_parameters,
        linear=linear,
        embedding_parameters=num_embedding,
        head_parameters=num_head,
        other_parameters=num_parameters - num_linear - num_embedding - num_head,
        largest_parameter=max(p.numel() for p in model.parameters()),
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or widest,
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
        max_context=getattr(text, "max_position_embeddings", None),
        config=text,
        trust_remote_code=trust_remote_code,
    )
    architecture.__dict__["model"] = model  # what the cached property would build again
    return architecture


def meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The config's causal language model on the meta device.

    Raises:
        ModelError: there is none.
    """
    try:
        with torch.device("meta"), quiet_transformers():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # each architecture's own code refuses a config in its own way
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"config.json ({config.model_type}): makes no causal language model ({reason}). "
            "Give the config of a decoder, such as Llama, Mistral, Qwen or Gemma."
        ) from None
    return model


def _linear_layer(path: str, module: Any) -> LinearLayer:
    if type(module) is nn.Linear:
        return LinearLayer(path, module.in_features, module.out_features, module.bias is not None, True)
    rows, columns = module.weight.shape  # Conv1D keeps [in, out]; a subclass of nn.Linear [out, in]
    shape = (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
    return LinearLayer(path, *shape, module.bias is not None, False)
