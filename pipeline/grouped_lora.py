"""LoRA deltas of many adapters in products that take all segments of a batch at once: `torch`'s grouped_mm.

A product a segment is over a hundred kernels a layer for eight adapters, each over a few hundred tokens, and the GPU
waits for the next one to be started. grouped_mm is one product for all segments, whatever their numbers of tokens;
ranks are filled up with zeros to the highest. A segment's numbers never meet another's: NaN stays where it is.

Shape suffixes: N tokens, P segments, I in features, O out features, R the highest rank, Q ranks of all segments.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import grouped_mm

logger = logging.getLogger(__name__)
ALIGNED = 8  # numbers of 16 bits in the 16 bytes that the kernel wants rows to be a multiple of
LARGEST = 2**31  # numbers of a tensor that 32 bits can count
MOST_PADDING = 3  # times the ranks' sum: the zeros are kept for the backward pass, and multiplied
CAPABILITIES = (9, 10)  # elsewhere torch multiplies a group at a time and waits for the GPU in between
TOLERANCE = 0.02  # of the largest number: bfloat16 has 8 bits
# Lengths and ranks (0: no adapter) of segments, features: torch has one kernel for few tokens and another for many.
TRIALS = (
    ([5, 40, 3, 19, 61], [8, 4, 0, 16, 1], (64, 96)),
    ([151, 403, 255, 1, 198], [8, 136, 16, 64, 0], (264, 392)),
)


def is_to_be_used(device: torch.device) -> bool:
    """Whether this GPU has such a kernel, and it computes what it should."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(device)[0] not in CAPABILITIES:
        return False
    try:
        difference = largest_difference(device)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
    else:
        if difference < TOLERANCE:  # not so if it is NaN
            return True
        reason = f"it computes otherwise, by {difference:.2g} of the largest number"
    logger.warning("grouped_mm is of no use on this GPU, so LoRA takes a product a segment, slower: %s", reason)
    return False


def takes(x_NI: torch.Tensor, y_NO: torch.Tensor, ranks: Sequence[int], num_segments: int) -> bool:
    """Whether the deltas of a layer of these inputs, outputs and adapters can be computed so, and are better so."""
    are_low = x_NI.dtype is y_NO.dtype is torch.bfloat16
    are_aligned = not x_NI.shape[1] % ALIGNED and not y_NO.shape[1] % ALIGNED
    are_small = max(x_NI.numel(), y_NO.numel()) < LARGEST
    return are_low and are_aligned and are_small and num_segments * _padded(ranks) <= MOST_PADDING * sum(ranks)


def largest_difference(device: torch.device) -> float:
    """Of outputs and gradients from those of plain products in float32, in `TRIALS`: of the largest number.

    One token is NaN: what it makes NaN in the plain products, the rest of its segment's numbers, is left out.
    """
    differences = [_difference(device, *trial) for trial in TRIALS]
    return float(torch.stack(differences).max())  # NaN if one is: Python's max may drop it


def _difference(device: torch.device, lengths: list[int], ranks: list[int], features: tuple[int, int]) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    num_in, num_out = features

    def made_up(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(device, torch.bfloat16).float().requires_grad_()

    x_NI, y_NO, to_y_NO = (made_up(sum(lengths), width) for width in (num_in, num_out, num_out))
    with torch.no_grad():
        x_NI[lengths[0]] = torch.nan  # the second segment's first
    present = [p for p, rank in enumerate(ranks) if rank]
    scalings = [0.7 * (p + 1) if ranks[p] else 0.0 for p in range(len(ranks))]
    matrices = [matrix for p in present for matrix in (made_up(ranks[p], num_in), made_up(num_out, ranks[p]))]
    parts, pairs = [], iter(matrices)
    for x, y, scaling in zip(x_NI.split(lengths), y_NO.split(lengths), scalings, strict=True):
        parts.append(y + scaling * (x @ next(pairs).t()) @ next(pairs).t() if scaling else y)
    expected = torch.cat(parts)
    found = GroupedDeltas.apply(
        y_NO.to(torch.bfloat16), x_NI.to(torch.bfloat16),
        torch.tensor(lengths, device=device).cumsum(0, dtype=torch.int32), torch.tensor(scalings, device=device),
        present, *matrices,
    )  # fmt: skip
    inputs = [x_NI, y_NO, *matrices]
    all_found = [found.detach(), *torch.autograd.grad(found, inputs, to_y_NO.to(torch.bfloat16))]
    all_expected = [expected.detach(), *torch.autograd.grad(expected, inputs, to_y_NO)]
    differences = []
    for mine, plain in zip(all_found, all_expected, strict=True):
        finite = plain.isfinite()
        if finite.any():
            differences.append((mine - plain)[finite].abs().max() / plain[finite].abs().max())
    return torch.stack(differences).max()


class GroupedDeltas(torch.autograd.Function):
    """y + s (x A^T) B^T a segment, into y itself, in bfloat16 but for matrices, scalings and the matrices' gradients.

    A segment without an adapter has one of zeros, which leaves y as it is where x is finite.

    Args:
        ends_P: int32, where the segments end, the last at N.
        scalings_P: float32, of the segments' adapters.
        present: numbers of the segments that have an adapter.
        matrices: A [its rank, I] and B [O, its rank] of each of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_NO: torch.Tensor,
        x_NI: torch.Tensor,
        ends_P: torch.Tensor,
        scalings_P: torch.Tensor,
        present: list[int],
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        ctx.present, ctx.ranks = present, [len(A) for A in matrices[::2]]
        ctx.dtypes = [matrix.dtype for matrix in matrices]
        ranks = dict(zip(present, ctx.ranks, strict=True))
        A_PRI = _fill_up(matrices[::2], ranks, len(ends_P), dim=0).view(len(ends_P), -1, x_NI.shape[1])
        A_PRI = (A_PRI * scalings_P[:, None, None]).to(x_NI.dtype)
        B_OQ = _fill_up(matrices[1::2], ranks, len(ends_P), dim=1).to(x_NI.dtype)
        B_POR = B_OQ.view(len(B_OQ), len(ends_P), -1).transpose(0, 1)
        inner_NR = grouped_mm(x_NI, A_PRI.transpose(1, 2), offs=ends_P)
        y_NO += grouped_mm(inner_NR, B_POR.transpose(1, 2), offs=ends_P)
        ctx.mark_dirty(y_NO)
        ctx.save_for_backward(x_NI, inner_NR, A_PRI, B_POR, ends_P, scalings_P)
        return y_NO

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x_NI, inner_NR, A_PRI, B_POR, ends_P, scalings_P = ctx.saved_tensors
        to_y_NO = gradients[0].contiguous()
        to_inner_NR = grouped_mm(to_y_NO, B_POR, offs=ends_P)
        to_x_NI = grouped_mm(to_inner_NR, A_PRI, offs=ends_P) if ctx.needs_input_grad[1] else None
        to_A: Sequence[torch.Tensor | None] = [None] * len(ctx.ranks)
        to_B = to_A
        own = list(zip(ctx.present, ctx.ranks, strict=True))
        if any(ctx.needs_input_grad[5::2]):  # else A is frozen (LoRA-FA)
            to_A_PRI = grouped_mm(to_inner_NR.t(), x_NI, offs=ends_P) * scalings_P[:, None, None]
            to_A = _copies([to_A_PRI[p, :rank] for p, rank in own], ctx.dtypes[::2])
        if any(ctx.needs_input_grad[6::2]):
            to_B_POR = grouped_mm(to_y_NO.t(), inner_NR, offs=ends_P)
            to_B = _copies([to_B_POR[p, :, :rank] for p, rank in own], ctx.dtypes[1::2])
        return to_y_NO, to_x_NI, None, None, None, *(each for pair in zip(to_A, to_B, strict=True) for each in pair)


def _copies(parts: list[torch.Tensor], dtypes: list[torch.dtype]) -> list[torch.Tensor]:
    """Gradients as parameters keep them: a part itself would keep the whole alive, the zeros too."""
    own = [torch.empty(part.shape, dtype=dtype, device=part.device) for part, dtype in zip(parts, dtypes, strict=True)]
    torch._foreach_copy_(own, parts)
    return own


def _padded(ranks: Sequence[int]) -> int:
    """The highest, as the kernel wants it."""
    return -(-max(ranks) // ALIGNED) * ALIGNED


def _fill_up(matrices: Sequence[torch.Tensor], ranks: dict[int, int], num_segments: int, dim: int) -> torch.Tensor:
    """All segments' matrices along their ranks, each with zeros up to the highest: [Q, I] or [O, Q]."""
    highest, parts, given = _padded(list(ranks.values())), [], iter(matrices)
    zero = matrices[0].new_zeros(1, 1)
    for p in range(num_segments):
        if p in ranks:
            parts.append(next(given))
        if missing := highest - ranks.get(p, 0):
            shape = [missing, matrices[0].shape[1]] if dim == 0 else [matrices[0].shape[0], missing]
            parts.append(zero.expand(shape))
    return torch.cat(parts, dim)
