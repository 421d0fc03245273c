"""What a training step adds to the weights, found by running this engine's own code without data.

torch's `FakeTensorMode` runs operations on tensors that have shapes, dtypes and strides but no memory. A few layers of
the model go through `supervised_loss` and its backward pass so, and every storage is counted from its first use to its
end. More layers add what one adds: its activations up to the loss, its gradients after it. Memory inside a kernel is
not seen.
"""

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel

from pipeline import packing
from pipeline.adamix import all_experts, two_route_loss
from pipeline.adapter_parts import without_absent
from pipeline.architecture import Architecture, meta_model
from pipeline.batching import Batch
from pipeline.errors import ModelError, PipelineError
from pipeline.fused_lora import fused_lora
from pipeline.live_bytes import LiveBytes
from pipeline.lora import attach_adapter, resolve_target_modules, target_layers
from pipeline.losses import CHUNK_ELEMENTS, ForwardPlan, supervised_loss
from pipeline.memory_setup import Setup
from pipeline.memory_states import base_dtype
from pipeline.native_layers import native_layers
from pipeline.new_tokens import mark_new_rows
from pipeline.optimizers import freeze_unused
from pipeline.runtime import torch_dtype
from pipeline.schema import Attention, QuantizationMethod, TrainMethod

TRACED_CHUNKS = 6  # of the loss
RENAMED = "`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated"  # by transformers
CUDA_ATTENTION = "simulated_cuda"


@dataclass(frozen=True)
class StepMemory:
    """Bytes beside weights, adapter and optimizer states, of all layers.

    Attributes:
        saved: what autograd keeps from the decoder's forward for its backward pass.
        loss: the most that the output head and the loss add to it, forward and backward.
        peak: the most at any moment of forward and backward, with the gradients that are there then.
        validation: the most of a forward without gradients, on twice the rows.
    """

    saved: int
    loss: int
    peak: int
    validation: int


def simulate_step(architecture: Architecture, setup: Setup, accumulates: bool) -> StepMemory:
    """The memory of one micro-batch of `setup.micro_batch_size` rows of `setup.length` tokens, all supervised.

    Args:
        accumulates: the gradients of an earlier micro-batch are there already, and count here as well.

    Raises:
        ModelError: the model's forward depends on values, not only on shapes.
    """
    period = _period(architecture)
    num_layers = min(architecture.num_layers, 2 * period + 1)
    more = architecture.num_layers - num_layers
    try:
        try:
            model, trace, validation = _trace(
                architecture, setup, num_layers, accumulates, setup.attention is not Attention.eager
            )
        except PipelineError:  # settings that the model does not have
            raise
        except (NotImplementedError, TypeError, ValueError, RuntimeError):  # then packing.packed_attention pads
            model, trace, validation = _trace(architecture, setup, num_layers, accumulates, packs=False)
    except PipelineError:
        raise
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{architecture.name}: its memory cannot be planned: its forward cannot be followed without data "
            f"({type(error).__name__}: {reason}). Set runtime.on_misfit=ignore to train without a plan."
        ) from None
    num_tokens = setup.micro_batch_size * setup.length * setup.num_routes
    untraced = max(0, num_tokens - _most_supervised(architecture.vocab_size))
    # hidden states and the parts of their gradient until the last chunk; after it those parts and the whole
    head_gradient = _gradient_bytes(packing.inner_model(model).get_output_embeddings())
    loss = trace.loss - trace.saved + 2 * untraced * trace.hidden_width
    loss = max(loss, head_gradient + 2 * num_tokens * trace.hidden_width)
    validation += 2 * untraced * trace.hidden_width
    a_layer = (trace.entries[2 * period] - trace.entries[period]) / period if more else 0.0
    saved = trace.saved + round(more * a_layer)
    before_rest = max(saved + loss, max(trace.forward, trace.last_layer) + round(more * a_layer))
    gradients_a_layer = _gradient_bytes(model.get_submodule(f"{trace.layers}.{num_layers - 1}"))
    if accumulates:
        there = _gradient_bytes(model) + more * gradients_a_layer
        return StepMemory(saved, loss, there + max(before_rest, trace.rest), validation)
    return StepMemory(saved, loss, max(before_rest, trace.rest + more * gradients_a_layer), validation)


@dataclass
class _Trace:
    """Bytes: at the entry of each layer, at the decoder's end, and the peaks of the step's four parts."""

    layers: str
    entries: list[int]
    hidden_width: int = 0  # of a token's last hidden state
    saved: int = 0
    forward: int = 0
    loss: int = 0  # forward and backward of head and loss
    last_layer: int = 0  # its backward
    rest: int = 0


def _period(architecture: Architecture) -> int:
    """Layers after which their kinds repeat."""
    kinds = getattr(architecture.config, "layer_types", None) or ["same"]
    return next(n for n in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False)))


def _small_model(architecture: Architecture, setup: Setup, num_layers: int) -> PreTrainedModel:
    """The model of that many layers with its adapter, its weights without memory."""
    config = copy.deepcopy(architecture.config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == architecture.num_layers:
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers
    config.dtype = torch_dtype(base_dtype(setup))
    model: Any = meta_model(config, architecture.trust_remote_code)
    if setup.method is TrainMethod.full:
        model.requires_grad_(True)
    else:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=RENAMED, category=FutureWarning)
            layers = list(target_layers(model, resolve_target_modules(model, setup.lora.target_modules)))
            lora = without_absent(setup.lora, model, layers)
            mark_new_rows(model, list(range(setup.num_new_tokens)))  # any rows: they take the same memory
            model = attach_adapter(model.requires_grad_(False), lora)
            freeze_unused(model, setup.train.optimizer)
    for module in all_experts(model):
        module.routes = [0] * setup.num_routes
    _give_fake_tensors(model)
    if setup.gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=RENAMED, category=FutureWarning)
            options = {"use_reentrant": False}
            packing.inner_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


def _give_fake_tensors(model: nn.Module) -> None:
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    with FakeTensorMode() as mode:
        for module in model.modules():
            for name, old in module._parameters.items():
                if old is not None and id(old) not in made:
                    empty = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(empty, requires_grad=old.requires_grad)
                module._parameters[name] = None if old is None else made[id(old)]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    model.__dict__["fake_mode"] = mode


def _batch(setup: Setup, num_rows: int) -> Batch:
    shape = (num_rows, setup.length)
    ids, mask = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.bool)
    return Batch(ids, mask, attention_mask=torch.empty(shape, dtype=torch.int64), max_length=setup.length)


@contextmanager
def _forwards(model: Any, setup: Setup, packs: bool) -> Iterator[tuple[LiveBytes, ForwardPlan]]:
    """Everything as the engine sets it for forwards of this setup."""
    inner = packing.inner_model(model)
    inner.config._attn_implementation = str(setup.attention)
    if packs:
        inner.config._attn_implementation = packing.NAME if setup.device == "cpu" else CUDA_ATTENTION
    is_int8 = setup.keeps_quantized and setup.quantization.method is QuantizationMethod.int8
    counter = LiveBytes(model.parameters(), _most_supervised(inner.config.vocab_size))
    in_c = native_layers(inner) if setup.device == "cpu" else nullcontext()
    with in_c, model.fake_mode, nullcontext() if is_int8 else fused_lora(model), counter:
        yield counter, ForwardPlan(packed=packs, chunked=True)


def _most_supervised(vocab_size: int) -> int:
    return TRACED_CHUNKS * max(1, CHUNK_ELEMENTS // vocab_size)


def _autocast(setup: Setup) -> Any:
    precision = setup.train.mixed_precision
    return torch.autocast("cpu", torch_dtype(precision)) if precision else nullcontext()


def _trace(
    architecture: Architecture, setup: Setup, num_layers: int, accumulates: bool, packs: bool
) -> tuple[Any, _Trace, int]:
    """The small model, its step, and the most of a validation."""
    model = _small_model(architecture, setup, num_layers)
    return model, _trace_step(model, setup, num_layers, accumulates, packs), _trace_validation(model, setup, packs)


def _trace_step(model: Any, setup: Setup, num_layers: int, accumulates: bool, packs: bool) -> _Trace:
    inner = packing.inner_model(model)
    layers = next(n for n, m in inner.named_modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers)
    prefix = next(name for name, module in model.named_modules() if module is inner)
    trace = _Trace(f"{prefix}.{layers}".lstrip("."), [])
    model.train()
    with _forwards(model, setup, packs) as (counter, plan):
        if accumulates:
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        counter.live = counter.peak = 0
        hooks = [
            layer.register_forward_pre_hook(_entry(trace, counter, num_layers)) for layer in inner.get_submodule(layers)
        ]
        hooks.append(inner.get_output_embeddings().register_forward_pre_hook(_end_of_decoder(trace, counter)))
        batch = _batch(setup, setup.micro_batch_size)
        loss_of = functools.partial(two_route_loss, consistency=1.0) if setup.num_routes == 2 else supervised_loss
        with _autocast(setup):
            loss, _ = loss_of(model, batch, plan)
        counter.sums_in_place = True
        (loss / setup.length).backward()
        trace.rest = counter.take_peak()
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return trace


def _entry(trace: _Trace, counter: LiveBytes, num_layers: int) -> Any:
    def note(module: nn.Module, args: Any, *_: Any) -> None:
        if len(trace.entries) == num_layers:
            return  # computed again for the backward pass
        trace.entries.append(counter.live)
        if len(trace.entries) == num_layers and args[0].requires_grad:
            args[0].register_hook(lambda _: setattr(trace, "last_layer", counter.take_peak()))

    return note


def _end_of_decoder(trace: _Trace, counter: LiveBytes) -> Any:
    def note(module: nn.Module, args: Any, *_: Any) -> None:
        if trace.saved:
            return  # a chunk of the loss
        trace.saved, trace.forward = counter.live, counter.take_peak()
        trace.hidden_width = args[0].shape[-1] * args[0].element_size()
        args[0].register_hook(lambda _: setattr(trace, "loss", counter.take_peak()))

    return note


def _trace_validation(model: Any, setup: Setup, packs: bool) -> int:
    model.eval()
    with _forwards(model, setup, packs) as (counter, plan), torch.no_grad(), _autocast(setup):
        supervised_loss(model, _batch(setup, 2 * setup.micro_batch_size), plan)
        return counter.take_peak()


def _gradient_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def _cuda_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What `packed_sdpa` keeps on CUDA, where torch picks the kernel: the fused ones keep no scores.

    In float32 with groups of query heads none of them is taken, and all scores are kept: the memory-efficient kernel
    knows no groups, flash attention and cuDNN's no float32 (torch's sdp_utils.cpp).
    """
    if any(others.get(name) is not None for name in packing.UNKNOWN):
        raise NotImplementedError("as packed_sdpa")
    has_groups = query.shape[1] != key.shape[1]
    is_float32 = query.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
    with sdpa_kernel(SDPBackend.MATH) if has_groups and is_float32 else nullcontext():
        output = F.scaled_dot_product_attention(
            query, key, value, None, dropout, is_causal=True, scale=scaling, enable_gqa=has_groups
        )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(CUDA_ATTENTION, _cuda_attention)  # without a mask function: it needs no mask
