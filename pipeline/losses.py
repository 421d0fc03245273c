"""Cross entropy over supervised tokens, summed; and its measurement on a split.

Shape suffixes: B rows, T tokens, S supervised positions, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from pipeline.batching import Batch, batches_by_length
from pipeline.dataset import Split
from pipeline.errors import DataError


@dataclass(frozen=True)
class Loss:
    """Attributes:
    loss: nats per supervised token.
    num_tokens: supervised tokens.
    """

    loss: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def supervised_logits(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 logits_SV that predict the supervised tokens, and these tokens, int64 [S].

    Only positions that some row supervises reach the output head (`logits_to_keep`): prompts get no logits.
    """
    predicts_BT = F.pad(batch.completion_mask[:, 1:], (0, 1))  # position t predicts token t + 1
    positions = predicts_BT.any(dim=0).nonzero().squeeze(1)
    output = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=positions
    )
    kept_BK = predicts_BT[:, positions]
    targets_BK = batch.input_ids[:, positions + 1]
    return output.logits[kept_BK].float(), targets_BK[kept_BK]


def supervised_loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
    """The summed cross entropy (float32 scalar, nats) over the batch's supervised tokens, and their number.

    A sum, not a mean: dividing by the tokens of the whole effective batch is right for unequal completions,
    the mean of micro-batch means is not. One mask makes both numbers.
    """
    logits_SV, targets_S = supervised_logits(model, batch)
    return F.cross_entropy(logits_SV, targets_S, reduction="sum"), targets_S.numel()


@torch.no_grad()
def measure_loss(
    model: torch.nn.Module, split: Split, batch_size: int, pad_token_id: int, progress: bool = False
) -> Loss:
    """Loss of the model on every row of the split; the model's train or eval mode is put back.

    Raises:
        DataError: the split has no supervised token.
    """
    if not split.num_supervised.sum():
        raise DataError(f"split {split.name}: no supervised token to measure a loss on. Look at metrics/prepare.json.")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    batches = batches_by_length(split, batch_size, pad_token_id)
    num_batches = math.ceil(len(split) / batch_size)
    for batch in tqdm(batches, total=num_batches, desc=f"loss on {split.name}", disable=not progress, leave=False):
        if batch.completion_mask.any():
            loss, num_tokens = supervised_loss(model, batch.to(device))
            total += loss.item()
            count += num_tokens
    model.train(was_training)
    return Loss(total / count, count)
