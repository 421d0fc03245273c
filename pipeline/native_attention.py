"""Causal attention on a CPU, and its gradient, in C compiled for the machine at hand.

torch's kernel has products whose inner size is the width of a head: 8 to 64 fill a CPU's vector units badly. Here the
lanes of a vector are queries (or keys), so that nothing is added up across lanes; scores above the diagonal are left
out; and of the scores nothing but a number a query is kept for the backward pass. 2 to 5 times as fast as torch's
(docs/performance.md). Sums are in float32 for 16-bit heads too. The number of threads changes no bit.

Needs a C compiler with OpenMP, as `torch.compile` does; without one attention is torch's, and the log says so.

Shape suffixes: B rows of the batch, H heads, G heads of keys and values, N tokens, D head width.
"""

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import PipelineError

logger = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.bfloat16)
WIDEST = 64  # heads; torch's kernel is as fast for wider ones
SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
COMPILE_SECONDS = 120


class CannotCompile(PipelineError):
    """This machine has no compiler for the kernel."""


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether attention of these heads, [..., tokens, width], is done here."""
    # under autocast torch's own attention turns fp32 into the lower precision
    is_fp32_of_autocast = query.dtype is torch.float32 and torch.is_autocast_enabled("cpu")
    is_ours = query.dtype is key.dtype is value.dtype and query.dtype in DTYPES and not is_fp32_of_autocast
    fits = query.device.type == "cpu" and query.shape[-1] == value.shape[-1] <= WIDEST
    return is_ours and fits and _library(query.shape[-1]) is not None


def attend(
    query_BHND: torch.Tensor, key_BGND: torch.Tensor, value_BGND: torch.Tensor, ends: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """softmax(scale Q K^T + causal mask) V, [B, N, H, D] of their dtype; query head h reads key head h // (H / G).

    Args:
        ends: int32 [rows + 1], where the rows that lie end to end in the only one of the batch begin and end. None:
            the rows are those of the batch.
    """
    output_BNHD: torch.Tensor = _forward(query_BHND, key_BGND, value_BGND, ends, scale)[0]
    return output_BNHD


@torch.library.custom_op("lora_pipeline::attention", mutates_args=())
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and float32 [B, H, N]: log2 of the sum of each query's weights."""
    heads = [_readable(tensor) for tensor in (query, key, value)]
    output, logs = _results(query)
    output = output.float()
    _library(query.shape[-1]).forward(
        *map(_Tensor.of, (*heads, output.transpose(1, 2))), logs.data_ptr(), *_rows(query, key, ends), scale
    )
    return output.to(query.dtype), logs


def _results(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query.transpose(1, 2)).contiguous(), query.new_empty(query.shape[:3], dtype=torch.float32)


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
    to_heads = [_readable(to_output.transpose(1, 2)), *map(torch.empty_like, heads[:3])]
    products = torch.empty_like(logs)
    _library(query.shape[-1]).backward(
        *map(_Tensor.of, heads), logs.data_ptr(), *_rows(query, key, ends), scale,
        *map(_Tensor.of, to_heads), products.data_ptr(),
    )  # fmt: skip
    to_query, to_key, to_value = (tensor.to(query.dtype) for tensor in to_heads[1:])
    return to_query, to_key, to_value


@_backward.register_fake
def _(query: Any, key: Any, value: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    *heads, ends, ctx.scale = inputs
    ctx.save_for_backward(*heads, ends, *output)


def _gradients(ctx: Any, to_output: torch.Tensor, _: torch.Tensor) -> Any:
    query, key, value, ends, output, logs = ctx.saved_tensors
    return *_backward(query, key, value, ends, ctx.scale, output, logs, to_output), None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, with the width's numbers side by side."""
    tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(query: torch.Tensor, key: torch.Tensor, ends: torch.Tensor | None) -> tuple[Any, ...]:
    """What C is told of shapes: ends, number of rows, heads, heads of keys, tokens; and torch's number of threads."""
    batch, heads, tokens, _ = query.shape
    rows = (None, batch) if ends is None else (ends.data_ptr(), len(ends) - 1)
    return *rows, heads, key.shape[1], tokens, torch.get_num_threads()


class _Tensor(ctypes.Structure):
    """float32 [B, heads, N, D] as C reads it: where it begins, and the strides of all but the width."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token"))]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_Tensor":
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


@functools.cache
def _library(width: int) -> Any:
    """The kernel for heads of this width; None, with a warning, where it cannot be compiled."""
    try:
        return compile_kernel(width)
    except CannotCompile as error:
        logger.warning("attention on the CPU is torch's, 2 to 5 times as slow: %s", error)
        return None


def compile_kernel(width: int) -> Any:
    """The C functions for heads of this width. Raises: CannotCompile."""
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "attention.so"
        command = [*shlex.split(compiler), *FLAGS, f"-DWIDTH={width}", "-o", str(library), str(SOURCE), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            loaded = ctypes.CDLL(str(library))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            said = (str(getattr(error, "stderr", None) or error).strip() or "no reason given").splitlines()[-1]
            raise CannotCompile(
                f"no C compiler with OpenMP ({compiler}: {said}). Install gcc, or name yours in the environment "
                "variable CC."
            ) from error
    inputs = [*[_Tensor] * 4, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 4, ctypes.c_int, ctypes.c_float]
    loaded.forward.argtypes, loaded.forward.restype = inputs, None
    loaded.backward.argtypes, loaded.backward.restype = [*inputs, *[_Tensor] * 4, ctypes.c_void_p], None
    return loaded
