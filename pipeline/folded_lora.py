"""LoRA of small fp32 layers on a CPU as one product: y = x (W + s B A)^T instead of x W^T + s (x A^T) B^T.

For a small layer, adding s B A to its weight costs next to nothing, while two thin products forward and four backward,
and the passes over their results, cost more than the layer itself. The gradient of the sum, g^T x, is one product as
large as the layer's own, and gives those of A and B. The same numbers to fp32 rounding; not for 16-bit weights, whose
rounding would swallow the sum.

Shape suffixes: N tokens, I in features, O out features, R rank.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

LARGEST = 2**16  # weights of a layer; measured: 0.7 of the time at 64 x 64, 0.9 at 128 x 384, 1.2 at 512 x 512


@contextmanager
def folded_lora(model: nn.Module) -> Iterator[int]:
    """Computes the adapter's small layers so while inside; says how many there are."""
    layers = [layer for layer in model.modules() if _takes(layer)]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _takes(layer: Any) -> bool:
    """Whether this is peft's plain LoRA (no dropout, no DoRA) on a small fp32 linear layer on the CPU."""
    if type(layer).__module__ != "peft.tuners.lora.layer" or type(getattr(layer, "base_layer", None)) is not nn.Linear:
        return False
    if layer.active_adapters != ["default"] or layer.merged or layer.lora_variant or layer.lora_bias["default"]:
        return False
    weights = (layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return (
        isinstance(layer.lora_dropout["default"], nn.Identity)
        and all(w.dtype is torch.float32 and w.device.type == "cpu" for w in weights)
        and not weights[0].requires_grad
        and weights[0].numel() <= LARGEST
    )


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    if layer.disable_adapters or torch.is_autocast_enabled("cpu"):
        output: torch.Tensor = type(layer).forward(layer, x)
        return output
    matrices = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = layer.base_layer
    y: torch.Tensor = _FoldedLinear.apply(x.flatten(0, -2), base.weight, *matrices, layer.scaling["default"])
    y = y if base.bias is None else y + base.bias
    return y.view(*x.shape[:-1], -1)


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
        to_sum_OI = (to_y_NO.t() @ x_NI).mul_(ctx.scaling)
        return to_x_NI, None, B_OR.t() @ to_sum_OI, to_sum_OI @ A_RI.t(), None
