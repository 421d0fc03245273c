"""Linear layers of a model to bitsandbytes' 4-bit and 8-bit ones, and back.

Shape suffixes: O out features, I in features.
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import BitsAndBytesConfig, PreTrainedModel

from pipeline.bnb import bnb, dequantize_4bit, params_4bit, protect_from_repacking
from pipeline.errors import ConfigError, ModelError
from pipeline.runtime import torch_dtype
from pipeline.schema import QuantizationConfig, QuantizationMethod

logger = logging.getLogger(__name__)
FOUR_BIT = (QuantizationMethod.nf4, QuantizationMethod.fp4)


@dataclasses.dataclass(frozen=True)
class LayerError:
    """What quantisation did to one linear layer.

    Attributes:
        num_parameters: weights quantised.
        num_bits: codes and scales, without the constant lookup tables.
        relative_error: Frobenius norm of the change over that of the weights.
    """

    layer: str
    num_parameters: int
    num_bits: int
    relative_error: float

    @property
    def bits_per_parameter(self) -> float:
        return self.num_bits / self.num_parameters


def linear_names(model: PreTrainedModel, skip_modules: list[str]) -> tuple[list[str], list[str]]:
    """Names of the linear layers to quantise, and of those left as they are.

    The output head stays (tied or not), and what `skip_modules` names: one of its names is a run of whole components of
    the layer's dotted name, such as `down_proj`, `layers.0` or `model.layers.0.mlp.down_proj`.

    Raises:
        ConfigError: a name of `skip_modules` matches no linear layer, or nothing is left to quantise.
    """
    head = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    skipped = {name for name, module in linears.items() if module is head}
    for wanted in skip_modules:
        matched = {name for name in linears if f".{wanted}." in f".{name}."}
        if not matched:
            kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
            raise ConfigError(f"quantization.skip_modules: '{wanted}' matches no linear layer; this model has {kinds}.")
        skipped |= matched
    chosen = [name for name in linears if name not in skipped]
    if not chosen:
        raise ConfigError(
            "quantization.skip_modules: leaves no linear layer to quantise. Shorten it, or set "
            "quantization.method=none."
        )
    return chosen, sorted(skipped)


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel, quantization: QuantizationConfig, device: torch.device, progress: bool = False
) -> list[LayerError]:
    """Replaces the model's linear layers by bitsandbytes' own, in place; what happened to each is returned.

    Each weight matrix is quantised on `device` by itself, so a base that lies in main memory need not fit on the GPU.

    Raises:
        ConfigError: see `linear_names`.
        ModelError: a weight is not finite.
    """
    names, skipped = linear_names(model, quantization.skip_modules)
    compute_dtype = torch_dtype(quantization.compute_dtype)
    make = _linear_4bit if quantization.method in FOUR_BIT else _linear_8bit
    errors = []
    for name in tqdm(names, desc=f"quantise to {quantization.method}", disable=not progress, leave=False):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight_OI = linear.weight.detach().to(device).contiguous()
        if not torch.isfinite(weight_OI).all():
            raise ModelError(f"{name}.weight: holds NaN or infinite values. The base is broken; fetch it again.")
        layer, num_bits = make(linear, weight_OI, quantization)
        restored_OI = dequantize_weight(layer, torch.float32)
        error = float((restored_OI - weight_OI.float()).norm() / weight_OI.float().norm().clamp(min=1e-30))
        errors.append(LayerError(name, weight_OI.numel(), num_bits, error))
        model.set_submodule(name, layer)
    protect_from_repacking(model)
    for parameter in (p for p in model.parameters() if p.is_floating_point() and not isinstance(p, bnb.nn.Params4bit)):
        if compute_dtype is not torch.float32:  # a wider stored dtype would only be cast down at every load
            parameter.data = parameter.data.to(compute_dtype)
    model.config.quantization_config = _transformers_config(quantization, skipped)
    model.config.dtype = compute_dtype
    return errors


def _linear_4bit(linear: nn.Linear, weight_OI: torch.Tensor, quantization: QuantizationConfig) -> tuple[nn.Module, int]:
    compute_dtype = torch_dtype(quantization.compute_dtype)
    kind = str(quantization.method)
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype,
        compress_statistics=quantization.double_quant,
        quant_type=kind,
        device="meta",
    )
    codes, state = bnb.functional.quantize_4bit(
        weight_OI, blocksize=quantization.blocksize, compress_statistics=quantization.double_quant, quant_type=kind
    )
    # Forward dequantises into the compute dtype, backward and merging into the state's: one dtype makes them agree.
    state.dtype = compute_dtype
    layer.weight = params_4bit(codes, state, layer)
    layer.bias = linear.bias
    scales = [state.absmax] + ([state.state2.absmax, state.offset] if state.nested else [])
    return layer, 8 * sum(t.numel() * t.element_size() for t in (codes, *scales))


def _linear_8bit(linear: nn.Linear, weight_OI: torch.Tensor, quantization: QuantizationConfig) -> tuple[nn.Module, int]:
    layer = bnb.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,
        device="meta",
    )
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight_OI.to(torch.float16))
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    layer.bias = linear.bias
    return layer, 8 * (codes.numel() + 4 * scales.numel())


def _transformers_config(quantization: QuantizationConfig, skipped: list[str]) -> BitsAndBytesConfig:
    if quantization.method is QuantizationMethod.int8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=str(quantization.method),
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=str(quantization.compute_dtype),
        llm_int8_skip_modules=skipped,
    )


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The model's bitsandbytes layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            yield name, module


def dequantize_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """weight_OI of a bitsandbytes layer, with the arithmetic of its forward in that dtype."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return (layer.weight.data.float() * (scales.float() / 127.0)[:, None]).to(dtype)
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state, dtype)


@torch.no_grad()
def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replaces every quantised layer by a plain linear one of `dtype`, in place; nothing of bitsandbytes stays."""
    for name, layer in list(quantized_layers(model)):
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(dequantize_weight(layer, dtype), requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, linear.train(layer.training))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for name in (
        "is_loaded_in_4bit",
        "is_loaded_in_8bit",
        "_weight_conversions",
    ):  # the last holds bitsandbytes' loading
        model.__dict__.pop(name, None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)
