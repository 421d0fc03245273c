"""Causal attention on a CPU, and its gradient, in C compiled for the machine at hand.

torch's kernel has products whose inner size is the width of a head: 8 to 64 fill a CPU's vector units badly. Here the
lanes of a vector are queries (or keys), so that nothing is added up across lanes; scores above the diagonal are left
out; and of the scores nothing but a number a query is kept for the backward pass. Up to 5 times as fast as torch's
(docs/performance.md). Sums are in float32 for bfloat16 heads too. The number of threads changes no bit.

Needs a C compiler with OpenMP, as `torch.compile` does; without one attention is torch's, and the log says so.

Shape suffixes: B rows of the batch, H heads, G heads of keys and values, N tokens, D head width.
"""

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

import torch

from pipeline.native import CannotCompile, HeadsInC, load_kernel

logger = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16)
WIDEST = 64  # heads; torch's kernel is as fast for wider ones
WIDEST_IN_SHORT = 128  # in bfloat16, rows of under SHORT tokens
SHORT = 192  # from there on torch takes larger blocks
SOURCE = Path(__file__).with_suffix(".c")


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, longest: int | None = None) -> bool:
    """Whether attention of these heads, [B, H or G, N, D], is done here.

    Args:
        longest: number of tokens of the longest row; None: N.
    """
    # under autocast torch's own attention turns fp32 into the lower precision
    is_fp32_of_autocast = query.dtype is torch.float32 and torch.is_autocast_enabled("cpu")
    is_ours = query.dtype is key.dtype is value.dtype and query.dtype in DTYPES and not is_fp32_of_autocast
    batch, heads, tokens, width = query.shape
    has_shape = key.shape == value.shape == (batch, key.shape[1], tokens, width) and heads % key.shape[1] == 0
    is_short = query.dtype is torch.bfloat16 and (longest or tokens) < SHORT
    fits = query.device.type == "cpu" and 0 < width <= (WIDEST_IN_SHORT if is_short else WIDEST)
    return is_ours and has_shape and fits and _library(width, query.dtype) is not None


def attend(
    query_BHND: torch.Tensor, key_BGND: torch.Tensor, value_BGND: torch.Tensor, ends: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """softmax(scale Q K^T + causal mask) V, [B, N, H, D] of their dtype; query head h reads key head h // (H / G).

    Args:
        ends: int32 [rows + 1], where the rows that lie end to end in the only one of the batch begin and end. None:
            the rows are those of the batch.

    Raises:
        ValueError: ends that are not those of one row of the batch.
    """
    batch, _, num_tokens, _ = query_BHND.shape
    if ends is not None and (batch, 0, num_tokens) != (1, int(ends[0]), int(ends[-1])):
        raise ValueError(f"rows from {int(ends[0])} to {int(ends[-1])}, and the batch is [{batch}, {num_tokens}]")
    output_BNHD: torch.Tensor = _forward(query_BHND, key_BGND, value_BGND, ends, scale)[0]
    return output_BNHD


@torch.library.custom_op("lora_pipeline::attention", mutates_args=())
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and float32 [B, H, N]: log2 of the sum of each query's weights."""
    heads = [_readable(tensor) for tensor in (query, key, value)]
    output, logs = _results(query)
    ends, room = _int32(ends), _room(query, ends, num_heads=4)
    _library(query.shape[-1], query.dtype).forward(
        *map(HeadsInC.of, (*heads, output.transpose(1, 2))), logs.data_ptr(), *_shape(query, key, ends, scale, room)
    )
    return output, logs


def _results(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, tokens, width = query.shape
    return query.new_empty(batch, tokens, heads, width), query.new_empty(query.shape[:3], dtype=torch.float32)


@_forward.register_fake
def _(query: Any, key: Any, value: Any, ends: Any, scale: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _results(query)


@torch.library.custom_op("lora_pipeline::attention_backward", mutates_args=())
def _backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor | None,
    scale: float,
    output: torch.Tensor,
    logs: torch.Tensor,
    to_output: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads = [_readable(tensor) for tensor in (query, key, value, output.transpose(1, 2))]
    to_query, to_key, to_value = _gradients(query), _gradients(key), _gradients(value)
    to_heads = _readable(to_output.transpose(1, 2)), to_query, to_key, to_value
    products = torch.empty_like(logs)
    ends, room = _int32(ends), _room(query, ends, num_heads=8)
    _library(query.shape[-1], query.dtype).backward(
        *map(HeadsInC.of, heads), logs.data_ptr(), *_shape(query, key, ends, scale, room),
        *map(HeadsInC.of, to_heads), products.data_ptr(),
    )  # fmt: skip
    return to_query, to_key, to_value


def _gradients(heads: torch.Tensor) -> torch.Tensor:
    """Where they are written: over memory of [B, N, heads, D], as transformers has the heads."""
    batch, num_heads, tokens, width = heads.shape
    return heads.new_empty(batch, tokens, num_heads, width).transpose(1, 2)


@_backward.register_fake
def _(query: Any, key: Any, value: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _gradients(query), _gradients(key), _gradients(value)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *heads, ends, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*heads, ends, *output)


def _differentiate(ctx: Any, to_output: torch.Tensor | None, _: None) -> Any:
    if to_output is None:
        return (None,) * 5
    query, key, value, ends, output, logs = ctx.saved_tensors
    return *_backward(query, key, value, ends, ctx.scale, output, logs, to_output), None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """With the width's numbers side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _int32(ends: torch.Tensor | None) -> torch.Tensor | None:
    return None if ends is None else ends.to(torch.int32).contiguous()


def _room(query: torch.Tensor, ends: torch.Tensor | None, num_heads: int) -> torch.Tensor:
    """float32 [threads, heads that a thread works on at once, tokens, D]; empty where the tensors are float32."""
    if query.dtype is torch.float32:
        return torch.empty(1, 0)
    longest = query.shape[2] if ends is None else int(ends.diff().max())
    return torch.empty(torch.get_num_threads(), num_heads * longest * query.shape[-1])


def _shape(
    query: torch.Tensor, key: torch.Tensor, ends: torch.Tensor | None, scale: float, room: torch.Tensor
) -> tuple[Any, ...]:
    """What C is told beside the tensors; `forward` names it."""
    batch, heads, tokens, _ = query.shape
    rows = (None, batch) if ends is None else (ends.data_ptr(), len(ends) - 1)
    threads = torch.get_num_threads()
    return *rows, heads, key.shape[1], tokens, threads, scale, room.data_ptr(), room.shape[1]


@functools.cache
def _library(width: int, dtype: torch.dtype) -> Any:
    """The kernel for such heads; None, with a warning, where it cannot be compiled."""
    try:
        return compile_kernel(width, dtype)
    except CannotCompile as error:
        logger.warning("attention on the CPU is torch's, up to 5 times as slow: %s", error)
        return None


@functools.cache
def compile_kernel(width: int, dtype: torch.dtype) -> Any:
    """The C functions for heads of this width. Raises: CannotCompile."""
    loaded = load_kernel(SOURCE, [f"-DWIDTH={width}", *(["-DBFLOAT16"] if dtype is torch.bfloat16 else [])])
    tensors, sizes = [HeadsInC] * 4, [ctypes.c_int64] * 4
    inputs = [*tensors, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_int, ctypes.c_float]
    inputs += [ctypes.c_void_p, ctypes.c_int64]
    loaded.forward.argtypes, loaded.forward.restype = inputs, None
    loaded.backward.argtypes, loaded.backward.restype = [*inputs, *tensors, ctypes.c_void_p], None
    return loaded
