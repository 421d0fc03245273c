"""Linear layers of one base under several LoRA adapters at once, each on its own tokens of the batch.

The tokens of an adapter lie together, so that a layer's work is cut into segments (as in LoRAFusion, arXiv 2510.00206,
and mLoRA, arXiv 2312.02515): one product with the base over all tokens and thin products a segment (for all segments at
once on some GPUs, `pipeline.grouped_lora`), or, for small fp32 layers on a CPU, y = x (W + s B A)^T a segment
(`pipeline.fused_lora` says why). Ranks, scalings and target modules may differ: an adapter that leaves a layer alone
has no delta in its segment. One autograd function does all segments.

Shape suffixes: N tokens, M adapters, P segments, I in features, O out features, R rank.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pipeline.bnb  # noqa: F401  # before peft, which imports bitsandbytes with it

# isort: split
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from pipeline import grouped_lora
from pipeline.errors import TrainingError
from pipeline.fused_lora import folds, is_plain, scaled_product
from pipeline.packing import inner_model

Adapter = tuple[torch.Tensor, torch.Tensor, float]  # A [R, I], B [O, R], scaling


class CannotFuse(TrainingError):
    """These adapters do not train together on this base; one by one they may."""


@dataclass
class Segments:
    """Whose tokens the batch holds, in its order.

    Attributes:
        pieces: adapter and number of tokens; to be laid out before each forward.
        grouped: the GPU takes all of them in one product.
        members_P, ends_P: the same on the device: adapters, int64, and where their tokens end, int32.
    """

    pieces: list[tuple[int, int]] = field(default_factory=list)
    grouped: bool = False
    members_P: torch.Tensor = field(init=False)
    ends_P: torch.Tensor = field(init=False)

    def lay_out(self, pieces: list[tuple[int, int]], device: torch.device) -> None:
        self.pieces = pieces
        members, lengths = zip(*pieces, strict=True)
        both = torch.tensor([members, list(itertools.accumulate(lengths))], device=device)
        self.members_P, self.ends_P = both[0], both[1].to(torch.int32)

    def bounds(self, num_tokens: int) -> list[tuple[int, int, int]]:
        """Adapter, first token and the one after the last. Raises: CannotFuse: they are not the layer's tokens."""
        ends = list(itertools.accumulate(length for _, length in self.pieces))
        if not ends or ends[-1] != num_tokens:
            raise CannotFuse(
                f"a layer gets {num_tokens} tokens of a batch of {ends[-1] if ends else 0}: adapters cannot be told "
                "apart there"
            )
        return [(member, end - length, end) for (member, length), end in zip(self.pieces, ends, strict=True)]


def share_weights(model: nn.Module) -> Any:
    """Another model object over the same parameters and buffers, to carry an adapter of its own."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    shared = [*tensors, *(m.quant_state for m in model.modules() if getattr(m, "quant_state", None) is not None)]
    return copy.deepcopy(model, {id(each): each for each in shared})


@contextmanager
def segmented_lora(base: nn.Module, models: Sequence[nn.Module]) -> Iterator[Segments]:
    """While inside, the base's layers compute with the adapters of all models, as the segments say.

    Args:
        models: PEFT models whose bases are `share_weights` of this one.

    Raises:
        CannotFuse: an adapter that is more than plain LoRA.
    """
    device = next(base.parameters()).device
    segments, changed = Segments(grouped=grouped_lora.is_to_be_used(device)), []
    try:
        for path, adapters in _adapters(models).items():
            layer = base.get_submodule(path)
            before = layer.__dict__.get("forward")
            changed.append((layer, before))
            scalings_M = torch.tensor([adapter[2] if adapter else 0.0 for adapter in adapters], device=device)
            layer.forward = functools.partial(_forward, layer, layer.forward, adapters, scalings_M, segments)
        yield segments
    finally:
        for layer, before in changed:
            del layer.forward
            if before is not None:
                layer.forward = before


def _adapters(models: Sequence[nn.Module]) -> dict[str, list[Adapter | None]]:
    """For each layer that some adapter is on, every model's adapter there."""
    found: dict[str, list[Adapter | None]] = {}
    for i, model in enumerate(models):
        for path, layer in inner_model(model).named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            if not is_plain(layer):
                raise CannotFuse(f"{path}: its adapter is more than plain LoRA on a linear layer")
            A_RI: Any = layer.lora_A["default"].weight
            B_OR: Any = layer.lora_B["default"].weight
            found.setdefault(path, [None] * len(models))[i] = A_RI, B_OR, layer.scaling["default"]
    return found


def _forward(
    layer: Any,
    base: Callable[[torch.Tensor], torch.Tensor],
    adapters: list[Adapter | None],
    scalings_M: torch.Tensor,
    segments: Segments,
    x: torch.Tensor,
) -> torch.Tensor:
    x_NI = x.flatten(0, -2)
    bounds: list[tuple[int, int]] = []
    scalings: list[float | None] = []
    matrices: list[torch.Tensor] = []
    for member, first, last in segments.bounds(len(x_NI)):
        adapter = adapters[member]
        bounds.append((first, last))
        scalings.append(adapter[2] if adapter else None)
        matrices += adapter[:2] if adapter else ()
    if folds(layer, x, torch.float32) and all(matrix.dtype is torch.float32 for matrix in matrices):
        y_NO: torch.Tensor = _FoldedSegments.apply(x_NI, layer.weight, bounds, scalings, *matrices)
        y_NO = y_NO if layer.bias is None else y_NO + layer.bias
    else:
        y_NO = base(x_NI)
        if matrices:
            with torch.autocast(x.device.type, enabled=False):  # everything is in the dtype of y from here
                x_NI = x_NI.to(y_NO.dtype)
                present = [p for p, scaling in enumerate(scalings) if scaling is not None]
                ranks = [len(A_RI) for A_RI in matrices[::2]]
                if segments.grouped and grouped_lora.takes(x_NI, y_NO, ranks, len(scalings)):
                    scalings_P = scalings_M[segments.members_P]
                    y_NO = grouped_lora.GroupedDeltas.apply(y_NO, x_NI, segments.ends_P, scalings_P, present, *matrices)
                else:
                    y_NO = _SegmentDeltas.apply(y_NO, x_NI, bounds, scalings, *matrices)
    return y_NO.view(*x.shape[:-1], y_NO.shape[-1])


class _SegmentDeltas(torch.autograd.Function):
    """y + s (x A^T) B^T a segment, into y itself; see `fused_lora._LoraDelta`."""

    @staticmethod
    def forward(
        ctx: Any,
        y_NO: torch.Tensor,
        x_NI: torch.Tensor,
        bounds: list[tuple[int, int]],
        scalings: list[float | None],
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        low = [matrix.to(x_NI.dtype) for matrix in matrices]
        pairs, inners = iter(zip(low[::2], low[1::2], strict=True)), []
        for (first, last), scaling in zip(bounds, scalings, strict=True):
            if scaling is not None:
                low_RI, low_OR = next(pairs)
                inner_NR = x_NI[first:last] @ low_RI.t()
                y_NO[first:last].addmm_(inner_NR, low_OR.t(), alpha=scaling)
                inners.append(inner_NR)
        ctx.mark_dirty(y_NO)
        ctx.save_for_backward(x_NI, *inners, *low)
        ctx.bounds, ctx.scalings, ctx.dtypes = bounds, scalings, [matrix.dtype for matrix in matrices]
        return y_NO

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x_NI, *others = ctx.saved_tensors
        num_adapters = len(ctx.dtypes) // 2
        inners, low = iter(others[:num_adapters]), iter(others[num_adapters:])
        to_y_NO = gradients[0]
        to_x_NI = torch.zeros_like(x_NI) if ctx.needs_input_grad[1] else None
        to_matrices: list[torch.Tensor] = []
        for (first, last), scaling in zip(ctx.bounds, ctx.scalings, strict=True):
            if scaling is not None:
                inner_NR, low_RI, low_OR = next(inners), next(low), next(low)
                part_NO = to_y_NO[first:last]
                to_inner_NR = scaled_product(part_NO, low_OR, scaling)
                if to_x_NI is not None:
                    torch.mm(to_inner_NR, low_RI, out=to_x_NI[first:last])
                to_matrices += [to_inner_NR.t() @ x_NI[first:last], scaled_product(part_NO.t(), inner_NR, scaling)]
        cast = [gradient.to(dtype) for gradient, dtype in zip(to_matrices, ctx.dtypes, strict=True)]
        return to_y_NO, to_x_NI, None, None, *cast


class _FoldedSegments(torch.autograd.Function):
    """x (W + s B A)^T a segment; see `fused_lora._FoldedLinear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: torch.Tensor,
        weight_OI: torch.Tensor,
        bounds: list[tuple[int, int]],
        scalings: list[float | None],
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        y_NO = x_NI.new_empty(len(x_NI), len(weight_OI))
        pairs, sums = iter(zip(matrices[::2], matrices[1::2], strict=True)), []
        for (first, last), scaling in zip(bounds, scalings, strict=True):
            sum_OI = weight_OI
            if scaling is not None:
                A_RI, B_OR = next(pairs)
                sum_OI = torch.addmm(weight_OI, B_OR, A_RI, alpha=scaling)
            torch.mm(x_NI[first:last], sum_OI.t(), out=y_NO[first:last])
            sums.append(sum_OI)
        ctx.save_for_backward(x_NI, *sums, *matrices)
        ctx.bounds, ctx.scalings = bounds, scalings
        return y_NO

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x_NI, *others = ctx.saved_tensors
        num_segments = len(ctx.bounds)
        sums, matrices = others[:num_segments], iter(others[num_segments:])
        to_y_NO = gradients[0]
        to_x_NI = torch.empty_like(x_NI) if ctx.needs_input_grad[0] else None
        to_matrices: list[torch.Tensor] = []
        for (first, last), scaling, sum_OI in zip(ctx.bounds, ctx.scalings, sums, strict=True):
            part_NO = to_y_NO[first:last]
            if to_x_NI is not None:
                torch.mm(part_NO, sum_OI, out=to_x_NI[first:last])
            if scaling is not None:
                A_RI, B_OR = next(matrices), next(matrices)
                to_sum_OI = scaled_product(part_NO.t(), x_NI[first:last], scaling)
                to_matrices += [B_OR.t() @ to_sum_OI, to_sum_OI @ A_RI.t()]
        return to_x_NI, None, None, None, *to_matrices
