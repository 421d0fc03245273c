"""Rows to tensors: right-padded micro-batches of rows of similar length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.dataset import Split


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B rows, the longest of T tokens.

    Attributes:
        input_ids: int64 [B, T].
        attention_mask: int64 [B, T]; 0 = padding.
        completion_mask: bool [B, T]; True = this token is predicted and counts in the loss (never position 0).
        rows: their indices in the split.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor
    rows: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        if device.type == "cpu":
            return self
        ids, attention, completion = (
            t.to(device, non_blocking=True) for t in (self.input_ids, self.attention_mask, self.completion_mask)
        )
        return Batch(ids, attention, completion, self.rows)


def collate(split: Split, rows: Sequence[int], pad_token_id: int) -> Batch:
    """Pads the rows on the right to the longest of them."""
    shape = (len(rows), int(max(split.lengths[row] for row in rows)))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    completion_mask = np.zeros(shape, dtype=bool)
    for i, row in enumerate(rows):
        length = split.lengths[row]
        input_ids[i, :length] = split.input_ids(row)
        attention_mask[i, :length] = 1
        completion_mask[i, 1:length] = split.completion_mask(row)[1:]
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(attention_mask),
        torch.from_numpy(completion_mask),
        tuple(map(int, rows)),
    )


def batches_by_length(split: Split, batch_size: int, pad_token_id: int) -> Iterator[Batch]:
    """Every row once, longest first (so that memory runs out at once or not at all)."""
    order = np.argsort(-split.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield collate(split, order[start : start + batch_size].tolist(), pad_token_id)
