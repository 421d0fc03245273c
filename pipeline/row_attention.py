"""Causal attention of short rows on a CPU, and its gradient, in plain matrix products.

torch's fused kernel computes the scores again in its backward pass, and its products fill no vector unit where heads
are thin. Keeping the probabilities, and transposing the products, is in fp32 1.2 (32 wide) to 2.3 times (8 wide) as
fast for rows of up to some 200 tokens, in bf16 1.3 to 3 times (docs/performance.md); longer ones would keep too much.

Shape suffixes: H heads, G heads of keys and values, L tokens of the row, Q = L H / G queries of one of G, D head width.
"""

import functools
from typing import Any

import torch

LONGEST = 320  # tokens
WIDEST = {torch.float32: 32, torch.bfloat16: 128}
THIN = 16  # heads that as the last dimension of a product fill no vector unit


def row_attention(
    query_HLD: torch.Tensor, key_GLD: torch.Tensor, value_GLD: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(scale Q K^T + causal mask) V, [H, L, D] of their dtype; query head h reads key head h // (H / G)."""
    with torch.autocast("cpu", enabled=False):
        output: torch.Tensor = _RowAttention.apply(query_HLD, key_GLD, value_GLD, scale)
    return output


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether this is the faster way for rows of [..., length, head width]."""
    is_small = query.shape[-2] <= LONGEST and query.shape[-1] <= WIDEST.get(query.dtype, 0)
    # under autocast torch's own attention turns fp32 into the lower precision
    is_fp32_of_autocast = query.dtype is torch.float32 and torch.is_autocast_enabled("cpu")
    is_one_dtype = query.dtype is key.dtype is value.dtype
    return is_small and is_one_dtype and not is_fp32_of_autocast and query.device.type == "cpu"


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_HLD: torch.Tensor, key_GLD: torch.Tensor, value_GLD: torch.Tensor, scale: float) -> Any:
        num_groups, length, _ = key_GLD.shape
        query_GQD = query_HLD.reshape(num_groups, -1, query_HLD.shape[-1])
        mask_QL = _causal_mask(query_HLD.dtype, length, query_GQD.shape[1] // length)
        scores_GQL = torch.baddbmm(mask_QL, query_GQD, key_GLD.transpose(1, 2), alpha=scale)
        weights_GQL = torch.softmax(scores_GQL, -1)
        ctx.save_for_backward(query_GQD, key_GLD, value_GLD, weights_GQL)
        ctx.scale = scale
        return _product(weights_GQL, value_GLD).reshape(query_HLD.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query_GQD, key_GLD, value_GLD, weights_GQL = ctx.saved_tensors
        gradient_HLD = gradients[0]
        gradient_GQD = gradient_HLD.reshape(query_GQD.shape)
        to_value_GLD = _product(weights_GQL.transpose(1, 2), gradient_GQD)
        to_weights_GQL = torch.bmm(gradient_GQD, value_GLD.transpose(1, 2))
        to_scores_GQL = torch._softmax_backward_data(to_weights_GQL, weights_GQL, -1, weights_GQL.dtype)
        to_query_GQD = _product(to_scores_GQL, key_GLD).mul_(ctx.scale)
        to_key_GLD = _product(to_scores_GQL.transpose(1, 2), query_GQD).mul_(ctx.scale)
        return to_query_GQD.reshape(gradient_HLD.shape), to_key_GLD, to_value_GLD, None


def _product(left: torch.Tensor, right_D: torch.Tensor) -> torch.Tensor:
    """The batched product; for thin heads as the transposed one, which is up to four times as fast."""
    if right_D.shape[-1] > THIN:
        return torch.bmm(left, right_D)
    return torch.bmm(right_D.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2)


@functools.lru_cache(maxsize=64)  # the layers of a batch share them; at most 52 MB for 2 query heads a key head
def _causal_mask(dtype: torch.dtype, length: int, num_queries: int) -> torch.Tensor:
    """-inf over the diagonal, for each query head of a key head, [num_queries L, L]; added before the softmax."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1).repeat(num_queries, 1)
