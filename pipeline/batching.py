"""Rows to tensors: a micro-batch of rows of similar length, padded on the right or end to end."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from pipeline.dataset import Split


@dataclass(frozen=True)
class Batch:
    """A micro-batch: B rows of at most T tokens; packed, B is 1 and T the tokens of all rows.

    Attributes:
        input_ids: int64 [B, T].
        completion_mask: bool [B, T]; True = this token is predicted and counts in the loss (never a row's first).
        attention_mask: int64 [B, T]; 0 = padding. None where packed.
        position_ids: int64 [1, T], from 0 in every row. None where padded.
        cu_seq_lens: int32 [rows + 1], where the rows begin and end. None where padded.
        max_length: tokens of the longest row.
        rows: their indices in the split.
    """

    input_ids: torch.Tensor
    completion_mask: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    cu_seq_lens: torch.Tensor | None = None
    max_length: int = 0
    rows: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        if device.type == "cpu":
            return self
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def collate(split: Split, rows: Sequence[int], pad_token_id: int, packed: bool = False) -> Batch:
    """The rows as one micro-batch; packed, unless they are of one length, where nothing is padded anyway."""
    ids = [split.input_ids(row) for row in rows]
    masks = [split.completion_mask(row) for row in rows]
    packs = packed and len({len(row) for row in ids}) > 1
    batch = pack_rows(ids, masks) if packs else pad_rows(ids, masks, pad_token_id)
    return replace(batch, rows=tuple(map(int, rows)))


def pad_rows(ids: Sequence[np.ndarray], masks: Sequence[np.ndarray], pad_token_id: int) -> Batch:
    """Pads on the right to the longest row."""
    shape = (len(ids), max(map(len, ids)))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    completion_mask = np.zeros(shape, dtype=bool)
    for i, (row, mask) in enumerate(zip(ids, masks, strict=True)):
        input_ids[i, : len(row)] = row
        attention_mask[i, : len(row)] = 1
        completion_mask[i, 1 : len(row)] = mask[1:]
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(completion_mask),
        attention_mask=torch.from_numpy(attention_mask),
        max_length=shape[1],
    )


def pack_rows(ids: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Batch:
    """Lays the rows end to end."""
    lengths = [len(row) for row in ids]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    completion_mask = np.concatenate(masks).astype(bool)
    completion_mask[ends[:-1]] = False
    return Batch(
        torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        torch.from_numpy(completion_mask)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        cu_seq_lens=torch.from_numpy(ends.astype(np.int32)),
        max_length=max(lengths),
    )


def first_supervised(batch: Batch, num_tokens: int) -> Batch:
    """The batch with only the first supervised tokens of each row still supervised."""
    counts = batch.completion_mask.cumsum(dim=1)
    return replace(batch, completion_mask=batch.completion_mask & (counts <= num_tokens))


def rows_by_length(split: Split, batch_size: int) -> Iterator[list[int]]:
    """Every row that has a supervised token once, longest first (so that memory runs out at once or not at all)."""
    order = np.argsort(-split.lengths, kind="stable")
    order = order[split.num_supervised[order] > 0]
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size].tolist()
