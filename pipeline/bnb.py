"""bitsandbytes, imported and used so that its known hazards reach no model.

Whatever imports peft imports bitsandbytes with it, so such a module imports this one first.
"""

import copy
import functools
import importlib
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from pipeline.errors import ModelError

logger = logging.getLogger(__name__)


def _compile_later(compile_now: Callable[..., Any], function: Callable[..., Any], **options: Any) -> Any:
    """The function as `compile_now` makes it, which is asked at the first call."""
    compiled = functools.cache(lambda: compile_now(function, **options))
    return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))


def _import_without_download() -> ModuleType:
    """Imports bitsandbytes while the package `kernels` looks missing, and without compiling anything yet.

    On CPUs with AVX512-BF16 bitsandbytes 0.50 asks `kernels`, where installed, for a kernel from the Hub, at import.
    That is code without a pinned revision, and fails offline; nothing here needs it. The warning about its absence is
    held back too.

    It decorates four functions with `torch.compile`, which imports inductor: a fifth of the time that a training's
    imports take. Here each is compiled at its first call.
    """
    held = sys.modules.get("kernels")
    noise = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = noise.level
    sys.modules["kernels"] = None  # type: ignore[assignment]  # the import system's way to say: not there
    noise.setLevel(logging.ERROR)
    compile_now = torch.compile
    torch.compile = functools.partial(_compile_later, compile_now)
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compile_now
        noise.setLevel(level)
        del sys.modules["kernels"]
        if held is not None:
            sys.modules["kernels"] = held


bnb: Any = _import_without_download()


def protect_from_repacking(model: torch.nn.Module) -> int:
    """Keeps the model's 4-bit weights as they were loaded; returns the number of 4-bit layers.

    On CPUs with AVX512-BF16 an eval-mode forward of `Linear4bit` repacks its weights in place and drops their double
    quantisation: later gradients, dequantisation and saved weights are wrong, and nothing is raised (0.50.0 to 0.50.2).
    It also fails where `in_features` is no multiple of the blocksize. Call this after every load, before a forward.
    """
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def check_bitsandbytes(device: torch.device) -> None:
    """Quantises, dequantises and multiplies on the device, and compares with fp32 there.

    Raises:
        ModelError: bitsandbytes does not run on the device, is wrong there, or changes its weights in a forward.
    """
    advice = (
        f"installed: bitsandbytes {bnb.__version__}, torch {torch.__version__}"
        + (f" for CUDA {torch.version.cuda}" if torch.version.cuda else " (a CPU build)")
        + ". Install a bitsandbytes that has a library for this CUDA (`python -m bitsandbytes` tells what it "
        "found), or set "
        "quantization.method=none and train.method=lora."
    )
    try:
        problem = _trial(device)
    except Exception as error:  # a missing native library shows as many things, from RuntimeError to NameError
        lines = (str(error).strip() or "no message").splitlines()
        raise ModelError(
            f"bitsandbytes does not run on {device} ({type(error).__name__}: {lines[0]}); {advice}"
        ) from None
    if problem:
        raise ModelError(f"bitsandbytes on {device}: {problem}; {advice}")


def _trial(device: torch.device) -> str | None:
    """What is wrong with a layer of 96 to 172 features (no multiple of the blocksize); None where nothing is."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(96, 172, generator=generator).to(device)
    x_BI = torch.randn(8, 172, generator=generator).to(device)
    layer = bnb.nn.Linear4bit(172, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4", device="meta")
    data, state = bnb.functional.quantize_4bit(weight_OI, compress_statistics=True, quant_type="nf4")
    layer.weight = params_4bit(data, state, layer)
    if data.device.type != device.type or state.absmax.device.type != device.type:
        return f"the quantized weights came back on {data.device}"
    restored_OI = dequantize_4bit(data, state, torch.float32)
    error = float((restored_OI - weight_OI).norm() / weight_OI.norm())
    if not 0.05 < error < 0.15:  # NF4 at blocksize 64 loses about 9 % of normal weights
        return f"an NF4 round trip is off by {error:.3f} of the weights, expected about 0.09"
    before = data.clone()
    protect_from_repacking(layer)
    with torch.no_grad():
        product_BO = layer.eval()(x_BI)
    expected_BO = x_BI @ restored_OI.T
    error = float((product_BO - expected_BO).norm() / expected_BO.norm())
    if not error < 1e-2:  # TF32 and fused kernels round otherwise
        return f"a 4-bit product is off by {error:.2e} of the fp32 product"
    if not torch.equal(layer.weight.data.view(-1), before.view(-1)):
        return "a forward in eval mode changes the 4-bit weights in place"
    return None


def dequantize_4bit(data: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """weight_OI of 4-bit codes, with the arithmetic of the layer's forward in that dtype.

    The codes are read as one row: bitsandbytes' AVX512 kernel starts its blocks anew at every row, while quantising let
    them run on, so that even widths that are no multiple of the blocksize (352 at 64, 576 at 128) come out 5 to 36 %
    wrong, and nothing is raised (measured with 0.50.2).

    Raises:
        ModelError: the codes were repacked by a forward in eval mode.
    """
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(
            "4-bit weights were repacked by a forward in eval mode. Load the base again by "
            "pipeline.quantization.load_quantized."
        )
    flat = copy.copy(state)
    flat.shape, flat.dtype = torch.Size((1, state.shape.numel())), dtype
    return bnb.functional.dequantize_4bit(data.view(-1, 1), flat).view(state.shape)


def check_kept_layers(model: torch.nn.Module) -> None:
    """Runs one 4-bit layer of each shape on a few rows and compares with the product by its dequantised weights.

    Raises:
        ModelError: bitsandbytes' kernel is wrong for a shape (see `dequantize_4bit`).
    """
    seen = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, bnb.nn.Linear4bit) or layer.weight.quant_state.shape in seen:
            continue
        state = layer.weight.quant_state
        seen.add(state.shape)
        dtype = layer.compute_dtype
        generator = torch.Generator().manual_seed(0)
        x_BI = torch.randn(4, layer.in_features, generator=generator).to(layer.weight.device, dtype)
        with torch.no_grad():
            product_BO = layer(x_BI).float()
            expected_BO = torch.nn.functional.linear(
                x_BI, dequantize_4bit(layer.weight.data, state, dtype), layer.bias
            ).float()
        error = float((product_BO - expected_BO).norm() / expected_BO.norm().clamp(min=1e-30))
        if not error < 0.02:  # bf16 sums differ by some 0.005
            raise ModelError(
                f"{name}: bitsandbytes' 4-bit product on {x_BI.device} is off by {error:.2f} at width "
                f"{layer.in_features} and "
                f"blocksize {state.blocksize}. Set runtime.keep_quantized=never (the weights are dequantised "
                "right), or a "
                "quantization.blocksize that divides the width."
            )


def store_for_shards(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Stores 4-bit codes as `dtype`, the same bytes (`bnb_4bit_quant_storage`): FSDP cuts floating weights alone.

    Raises:
        ModelError: a layer whose codes do not fill whole numbers of that type.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            codes = layer.weight.data.view(-1)
            if codes.numel() % dtype.itemsize:
                raise ModelError(f"{name}: {codes.numel()} bytes of 4-bit codes are not whole numbers of {dtype}.")
            layer.quant_storage = dtype
            layer.weight = params_4bit(codes.view(dtype).view(-1, 1), layer.weight.quant_state, layer)


def params_4bit(data: torch.Tensor, state: Any, layer: torch.nn.Module) -> torch.nn.Parameter:
    """The 4-bit parameter of a layer, from codes and quantisation state that are there already."""
    layer.quant_state = state
    return bnb.nn.Params4bit(
        data,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=data.dtype,
        module=layer,
        bnb_quantized=True,
    )
