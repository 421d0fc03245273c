"""LoRA deltas of many adapters in products that take all segments of a batch at once: `torch`'s grouped_mm.

A product a segment is over a hundred kernels a layer for eight adapters, each over a few hundred tokens, and the GPU
waits for the next one to be started. grouped_mm is one kernel for all segments, whatever their numbers of tokens; ranks
are filled up with zeros to the highest. A segment's numbers never meet another's: NaN stays where it is.

Shape suffixes: N tokens, P segments, I in features, O out features, R the highest rank.
"""

import logging
from typing import Any

import torch
from torch.nn.functional import grouped_mm

logger = logging.getLogger(__name__)
ALIGNED = 8  # numbers of 16 bits in the 16 bytes that the kernel wants rows to be a multiple of
IN_ONE_KERNEL = (
    9,
    10,
)  # major compute capabilities; elsewhere torch multiplies a group at a time and waits for the GPU
TOLERANCE = 0.02  # of the largest number: bfloat16 has 8 bits


def is_to_be_used(device: torch.device) -> bool:
    """Whether this GPU has such a kernel, and it computes what it should."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in IN_ONE_KERNEL:
        return False
    try:
        difference = largest_difference(device)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
    else:
        if difference < TOLERANCE:  # not so if it is NaN
            return True
        reason = f"it computes otherwise, by {difference:.2g} of the largest number"
    logger.warning("grouped_mm is of no use on this GPU, so LoRA takes a product a segment, slower: %s", reason)
    return False


def takes(x_NI: torch.Tensor, y_NO: torch.Tensor) -> bool:
    """Whether the deltas of a layer of these inputs and outputs can be computed so."""
    return x_NI.dtype is torch.bfloat16 and not x_NI.shape[1] % ALIGNED and not y_NO.shape[1] % ALIGNED


def largest_difference(device: torch.device) -> float:
    """Of outputs and gradients from those of plain products in float32, on made-up segments: of the largest number."""
    random = torch.Generator().manual_seed(0)
    lengths, ranks, scalings = [5, 40, 3, 19, 61], [8, 4, 0, 16, 1], [2.0, 0.7, 0.0, 1.0, 3.0]
    ends_P = torch.tensor(lengths, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)

    def made_up(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(device, torch.bfloat16).float().requires_grad_()

    x_NI, y_NO, to_y_NO = made_up(sum(lengths), 64), made_up(sum(lengths), 96), made_up(sum(lengths), 96)
    matrices = [matrix for rank in ranks if rank for matrix in (made_up(rank, 64), made_up(96, rank))]
    parts, pairs = [], iter(matrices)
    for x, y, scaling in zip(x_NI.split(lengths), y_NO.split(lengths), scalings, strict=True):
        parts.append(y + scaling * (x @ next(pairs).t()) @ next(pairs).t() if scaling else y)
    expected = torch.cat(parts)
    found = GroupedDeltas.apply(
        y_NO.to(torch.bfloat16),
        x_NI.to(torch.bfloat16),
        ends_P,
        torch.tensor(scalings, device=device),
        [0, 1, 3, 4],
        *matrices,
    )
    inputs = [x_NI, y_NO, *matrices]
    all_found = [found.detach(), *torch.autograd.grad(found, inputs, to_y_NO.to(torch.bfloat16))]
    all_expected = [expected.detach(), *torch.autograd.grad(expected, inputs, to_y_NO)]
    differences = [(a - b).abs().max() / b.abs().max() for a, b in zip(all_found, all_expected, strict=True)]
    return float(torch.stack(differences).max())


class GroupedDeltas(torch.autograd.Function):
    """y + s (x A^T) B^T a segment, into y itself; all but y and its gradient in bfloat16, summed in float32.

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
        ctx.ranks = [len(A) for A in matrices[::2]]
        ctx.present, ctx.dtypes = present, [matrix.dtype for matrix in matrices]
        num_segments, rank = len(ends_P), -(-max(ctx.ranks) // ALIGNED) * ALIGNED
        A_PRI = x_NI.new_zeros(num_segments, rank, x_NI.shape[1])
        B_POR = x_NI.new_zeros(num_segments, y_NO.shape[1], rank)
        own = list(zip(present, ctx.ranks, strict=True))
        torch._foreach_copy_([A_PRI[p, :r] for p, r in own], matrices[::2])
        torch._foreach_copy_([B_POR[p, :, :r] for p, r in own], matrices[1::2])
        A_PRI *= scalings_P[:, None, None]
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
        to_A_PRI = grouped_mm(to_inner_NR.t(), x_NI, offs=ends_P) * scalings_P[:, None, None]  # float32
        to_B_POR = grouped_mm(to_y_NO.t(), inner_NR, offs=ends_P).float()
        to_matrices: list[torch.Tensor] = []
        for p, rank in zip(ctx.present, ctx.ranks, strict=True):
            to_matrices += [to_A_PRI[p, :rank], to_B_POR[p, :, :rank]]
        cast = [gradient.to(dtype) for gradient, dtype in zip(to_matrices, ctx.dtypes, strict=True)]
        return to_y_NO, to_x_NI, None, None, None, *cast
