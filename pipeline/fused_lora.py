"""LoRA layers in fewer products and passes than peft's own, to the same numbers but for rounding.

Over a 16-bit base the products are 16-bit ones, accumulated in fp32, as under autocast; the adapter's weights and their
gradients stay as they are.

`_LoraDelta` adds s (x A^T) B^T to what the base layer gives, in the base layer's dtype. Under autocast peft makes x
float32 for its float32 A, which autocast turns back, forward and backward; none of that is done here, and only x and
x A^T are kept for the backward pass; where A is frozen (LoRA-FA) not even x.

`_FoldedLinear` is for small fp32 layers on a CPU: y = x (W + s B A)^T. Adding s B A to a small weight costs next to
nothing, while the thin products cost more than the layer itself. The gradient of the sum, g^T x, is one product as
large as the layer's own, and gives those of A and B. Not for 16-bit weights, whose rounding would swallow the sum.

Shape suffixes: N tokens, I in features, O out features, R rank.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

LARGEST_FOLDED = 2**16  # weights of a layer; measured: 0.7 of the time at 64 x 64, 0.9 at 128 x 384, 1.2 at 512 x 512
PLAIN = {  # peft's own classes for linear layers; their subclasses for other quantizations are left alone
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
}


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[int]:
    """Computes the adapter's plain layers so while inside; says how many there are."""
    layers = [layer for layer in model.modules() if is_plain(layer)]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def is_plain(layer: Any) -> bool:
    """Whether this is peft's plain LoRA: one adapter, no dropout, no DoRA or other variant, no bias of its own."""
    if (type(layer).__module__, type(layer).__name__) not in PLAIN or layer.active_adapters != ["default"]:
        return False
    if "default" not in layer.lora_A or "forward" in vars(layer):  # another adapter's, or taken already
        return False
    is_bare = not layer.merged and not layer.lora_variant and not layer.lora_bias["default"]
    is_bare = is_bare and type(layer.lora_A["default"]) is nn.Linear  # no mixture
    return is_bare and isinstance(layer.lora_dropout["default"], nn.Identity)


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    if layer.disable_adapters:
        output: torch.Tensor = type(layer).forward(layer, x)
        return output
    x_NI = x.flatten(0, -2)
    A_RI, B_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    matrices = A_RI, B_OR, layer.scaling["default"]
    base = layer.base_layer
    if folds(base, x, A_RI.dtype):
        y_NO: torch.Tensor = _FoldedLinear.apply(x_NI, base.weight, *matrices)
        y_NO = y_NO if base.bias is None else y_NO + base.bias
    else:
        y_NO = base(x_NI)
        with torch.autocast(x.device.type, enabled=False):  # everything is in the dtype of y from here
            y_NO = _LoraDelta.apply(y_NO, x_NI.to(y_NO.dtype), *matrices)
    return y_NO.view(*x.shape[:-1], y_NO.shape[-1])


def folds(base: nn.Module, x: torch.Tensor, adapter_dtype: torch.dtype) -> bool:
    """Whether this is a layer for `_FoldedLinear`."""
    return (
        type(base) is nn.Linear
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and x.dtype is base.weight.dtype is adapter_dtype is torch.float32
        and not base.weight.requires_grad
        and base.weight.numel() <= LARGEST_FOLDED
    )


def scaled_product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """s a b, in one kernel, scaled before it is rounded."""
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scaling)  # beta 0: the empty number is not read


class _LoraDelta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_NO: torch.Tensor, x_NI: torch.Tensor, A_RI: torch.Tensor, B_OR: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        low_RI, low_OR = A_RI.to(x_NI.dtype), B_OR.to(x_NI.dtype)
        inner_NR = x_NI @ low_RI.t()
        ctx.save_for_backward(x_NI if ctx.needs_input_grad[2] else None, inner_NR, low_RI, low_OR)
        ctx.scaling, ctx.dtypes = scaling, (A_RI.dtype, B_OR.dtype)
        return torch.addmm(y_NO, inner_NR, low_OR.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x_NI, inner_NR, low_RI, low_OR = ctx.saved_tensors
        to_y_NO = gradients[0]
        to_inner_NR = scaled_product(to_y_NO, low_OR, ctx.scaling)
        to_x_NI = to_inner_NR @ low_RI if ctx.needs_input_grad[1] else None
        to_A_RI = (to_inner_NR.t() @ x_NI).to(ctx.dtypes[0]) if ctx.needs_input_grad[2] else None
        to_B_OR = scaled_product(to_y_NO.t(), inner_NR, ctx.scaling).to(ctx.dtypes[1])
        return to_y_NO, to_x_NI, to_A_RI, to_B_OR, None


class _FoldedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NI: torch.Tensor, weight_OI: torch.Tensor, A_RI: torch.Tensor, B_OR: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        sum_OI = torch.addmm(weight_OI, B_OR, A_RI, alpha=scaling)
        ctx.save_for_backward(x_NI, sum_OI, A_RI, B_OR)
        ctx.scaling = scaling
        return x_NI @ sum_OI.t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x_NI, sum_OI, A_RI, B_OR = ctx.saved_tensors
        to_y_NO = gradients[0]
        to_x_NI = to_y_NO @ sum_OI if ctx.needs_input_grad[0] else None
        to_sum_OI = scaled_product(to_y_NO.t(), x_NI, ctx.scaling)
        return to_x_NI, None, B_OR.t() @ to_sum_OI, to_sum_OI @ A_RI.t(), None
