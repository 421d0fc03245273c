"""RMS norm, SwiGLU and rotary embeddings of a frozen base on a CPU, in C with one pass over memory each.

torch makes 4 to 12 passes of each, over tensors that have left the caches, and as many for its gradient; and keeps what
is between them. Here the backward pass computes again what is cheap (docs/performance.md).

Whether an architecture's layer is one of these is tried, not read: its own code computes a made-up input beside C.

Shape suffixes: B rows of the batch, H heads, N tokens, D head width, X width.
"""

import ctypes
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from pipeline.native import CannotCompile, HeadsInC, load_kernel

logger = logging.getLogger(__name__)
SOURCE = Path(__file__).with_suffix(".c")
ROTATION = "apply_rotary_pos_emb"  # transformers' name in a model's module
CLOSE = 1e-5  # rounding


@contextmanager
def native_layers(model: nn.Module) -> Iterator[int]:
    """The model's layers that are known here compute in C while inside, float32 on a CPU; says how many they are.

    A rotation is a function of its architecture's module: all models of that architecture get it for the time. Several
    of these end in the reverse order of their beginnings. Outputs are contiguous, whatever the inputs are.
    """
    if next(model.parameters()).device.type != "cpu" or not is_compiled():
        yield 0
        return
    changed: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        if (way := _way(module)) is not None:
            changed.append((module, "forward", functools.partial(way, module)))
    for name in {type(module).__module__ for module in model.modules()}:
        rotate = getattr(sys.modules[name], ROTATION, None)
        if rotate is not None and _is_rotation(rotate):
            changed.append((sys.modules[name], ROTATION, functools.partial(_rotate, rotate)))
    before = [vars(owner).get(name) for owner, name, _ in changed]
    for owner, name, function in changed:
        setattr(owner, name, function)
    try:
        yield len(changed)
    finally:
        for (owner, name, _), own in zip(changed, before, strict=True):
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def is_compiled() -> bool:
    """Whether this machine has the kernels; they are compiled where they are not."""
    return _library() is not None


def _way(module: Any) -> Callable[..., torch.Tensor] | None:
    """What computes this layer in C, if anything does."""
    kind: Any = type(module)
    if "forward" in vars(module):  # taken already
        return None
    if {name for name, _ in module.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return _mlp if _is_swiglu(kind, module.act_fn) else None
    is_norm = hasattr(module, "variance_epsilon") and getattr(module, "weight", None) is not None
    return _norm if is_norm and _is_norm(kind) else None


@functools.cache
def _is_norm(kind: Any) -> bool:
    x_NX, weight_X = _made_up(3, 24), _made_up(24)
    standin = SimpleNamespace(weight=weight_X, variance_epsilon=0.1)
    return _agree(lambda: kind.forward(standin, x_NX), lambda: [_Norm.apply(x_NX, weight_X, 0.1)])


def _is_swiglu(kind: Any, activation: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    x_NX = _made_up(3, 24)
    standin = SimpleNamespace(
        gate_proj=lambda x: 3 * x, up_proj=lambda x: x - 1, down_proj=lambda x: x + 2, act_fn=activation
    )
    return _agree(lambda: kind.forward(standin, x_NX), lambda: [_Swiglu.apply(3 * x_NX, x_NX - 1) + 2])


def _is_rotation(rotate: Callable[..., Any]) -> bool:
    query, key, (cos, sin) = _made_up(2, 3, 5, 8), _made_up(2, 1, 5, 8), _made_up(2, 2, 5, 8)
    return _agree(lambda: rotate(query, key, cos, sin), lambda: _Rotate.apply(query, key, cos, sin))


def _made_up(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


@torch.no_grad()
def _agree(theirs: Callable[[], Any], ours: Callable[[], Any]) -> bool:
    """Whether both give the same tensors."""
    try:
        expected = theirs()
    except Exception:  # an architecture's own way raises anything on what it is not made for
        return False
    expected = list(expected) if isinstance(expected, (tuple, list)) else [expected]
    found = ours()
    return len(found) == len(expected) and all(
        isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype is b.dtype
        and torch.allclose(a, b, rtol=CLOSE, atol=CLOSE)
        for a, b in zip(found, expected, strict=True)
    )  # fmt: skip


def _takes(*tensors: Any) -> bool:
    """Whether they are all float32 on a CPU. Under autocast torch's own way turns some into the lower precision."""
    are_ours = all(isinstance(t, torch.Tensor) and t.dtype is torch.float32 and t.device.type == "cpu" for t in tensors)
    return are_ours and not torch.is_autocast_enabled("cpu")


def _norm(module: Any, *inputs: Any, **named: Any) -> Any:
    weight = module.weight
    is_trained = weight.requires_grad and torch.is_grad_enabled()
    if is_trained or named or len(inputs) != 1 or not _takes(*inputs, weight) or weight.shape != inputs[0].shape[-1:]:
        return type(module).forward(module, *inputs, **named)
    return _Norm.apply(*inputs, weight, module.variance_epsilon)


def _mlp(module: Any, *inputs: Any, **named: Any) -> Any:
    if named or len(inputs) != 1 or not _takes(*inputs):
        return type(module).forward(module, *inputs, **named)
    gate, up = module.gate_proj(*inputs), module.up_proj(*inputs)
    is_ours = _takes(gate, up) and gate.shape == up.shape
    return module.down_proj(_Swiglu.apply(gate, up) if is_ours else module.act_fn(gate) * up)


def _rotate(own: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if named or len(inputs) != 4 or not _takes(*inputs) or not _fit(*inputs):
        return own(*inputs, **named)
    return _Rotate.apply(*inputs)


def _fit(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether these are heads [B, H, N, D] and the angles of their tokens, [B or 1, N, D]."""
    if query.ndim != 4 or key.ndim != 4:
        return False
    batch, _, tokens, width = query.shape
    has_shape = key.shape == (batch, key.shape[1], tokens, width) and width % 2 == 0
    has_angles = cos.shape == sin.shape and cos.shape in ((1, tokens, width), (batch, tokens, width))
    return has_shape and has_angles and not cos.requires_grad and not sin.requires_grad


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_X: torch.Tensor, epsilon: float) -> torch.Tensor:
        x, weight_X = x.contiguous(), weight_X.contiguous()
        y, inverses = torch.empty_like(x), x.new_empty(x.shape[:-1])
        _call("norm", x, weight_X, y, inverses, inverses.numel(), x.shape[-1], epsilon)
        ctx.save_for_backward(x, weight_X, inverses)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight_X, inverses = ctx.saved_tensors
        to_x = torch.empty_like(x)
        _call("norm_backward", gradients[0].contiguous(), x, weight_X, inverses, to_x, inverses.numel(), x.shape[-1])
        return to_x, None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        _call("swiglu", gate, up, y, *_tokens_and_width(gate))
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        _call("swiglu_backward", gradients[0].contiguous(), gate, up, to_gate, to_up, *_tokens_and_width(gate))
        return to_gate, to_up


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_BHND: torch.Tensor, key_BHND: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return tuple(_rotated(heads, cos, sin, backward=False) for heads in (query_BHND, key_BHND))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return *(_rotated(heads, cos, sin, backward=True) for heads in gradients), None, None


def _rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool) -> torch.Tensor:
    """Over memory of [B, N, H, D], as the layer before has it and attention reads it."""
    heads = heads if heads.stride(-1) == 1 else heads.contiguous()
    batch, num_heads, length, width = heads.shape
    output = heads.new_empty(batch, length, num_heads, width).transpose(1, 2)
    angle_stride = cos.stride(0) if len(cos) > 1 else 0
    _call("rotate", heads, output, cos, sin, angle_stride, batch * length, length, num_heads, width // 2, int(backward))
    return output


def _tokens_and_width(x: torch.Tensor) -> tuple[int, int]:
    return x.numel() // max(1, x.shape[-1]), x.shape[-1]


def _call(name: str, *arguments: Any) -> None:
    """Nothing where the tensors have no memory: those of the plan."""
    if isinstance(arguments[0], FakeTensor):
        return
    library = _library()
    assert library is not None
    function = getattr(library, name)
    as_in_c = (HeadsInC.of if kind is HeadsInC else torch.Tensor.data_ptr for kind in function.argtypes)
    passed = [
        to_c(argument) if isinstance(argument, torch.Tensor) else argument
        for to_c, argument in zip(as_in_c, arguments, strict=False)
    ]
    function(*passed, torch.get_num_threads())


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The kernels; None, with a warning, where they cannot be compiled."""
    try:
        loaded = load_kernel(SOURCE)
    except CannotCompile as error:
        logger.warning("norms, SwiGLU and rotary embeddings on the CPU are torch's, which takes longer: %s", error)
        return None
    pointer, size, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.norm.argtypes = [*[pointer] * 4, size, size, ctypes.c_float, count]
    loaded.norm_backward.argtypes = [*[pointer] * 5, size, size, count]
    loaded.swiglu.argtypes = [*[pointer] * 3, size, size, count]
    loaded.swiglu_backward.argtypes = [*[pointer] * 5, size, size, count]
    loaded.rotate.argtypes = [HeadsInC, HeadsInC, pointer, pointer, *[size] * 5, count, count]
    for function in (loaded.norm, loaded.norm_backward, loaded.swiglu, loaded.swiglu_backward, loaded.rotate):
        function.restype = None
    return loaded
