"""Is the merged model the adapter on its base? Logits of real rows, compared in fp32 before any cast.

Shape suffixes: B rows, T tokens, N tokens that are no padding, V vocabulary.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from pipeline.batching import Batch, collate
from pipeline.dataset import load_split
from pipeline.errors import ParityError
from pipeline.losses import supervised_loss
from pipeline.packing import model_inputs
from pipeline.schema import MergeConfig

logger = logging.getLogger(__name__)
BATCH_SIZE = 4
CHUNK = 256  # tokens whose distributions are compared at once, in float64


@dataclass(frozen=True)
class Parity:
    """How far one model's next-token distributions are from a reference's.

    Attributes:
        max_abs_logit_diff: over all tokens and the vocabulary.
        mean_kl: KL(reference || model), nats a token.
        top1_agreement: share of the tokens where both put the same token first.
        num_tokens: compared.
    """

    max_abs_logit_diff: float
    mean_kl: float
    top1_agreement: float
    num_tokens: int


def parity_batches(processed: Path, num_tokens: int, pad_token_id: int) -> list[Batch]:
    """Whole rows, prompts and completions, until they hold `num_tokens` tokens: of test, then of validation and train.

    Fewer, with a warning, where the data has no more.
    """
    batches: list[Batch] = []
    found = 0
    for name in ("test", "validation", "train"):
        split = load_split(processed, name)
        rows = []
        for row in range(len(split)):
            if found >= num_tokens:
                break
            rows.append(row)
            found += int(split.lengths[row])
        rows.sort(key=lambda row: -int(split.lengths[row]))
        batches += [collate(split, rows[i : i + BATCH_SIZE], pad_token_id) for i in range(0, len(rows), BATCH_SIZE)]
    if found < num_tokens:
        logger.warning(
            "merge.parity_num_tokens: %d, but all of the data has %d tokens; parity is on these", num_tokens, found
        )
    return batches


@torch.no_grad()
def token_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """float32 logits_NV at every token that is no padding, in main memory."""
    device = next(model.parameters()).device
    moved = batch.to(device)
    logits_BTV = model(**model_inputs(moved)).logits
    assert moved.attention_mask is not None
    return logits_BTV[moved.attention_mask.bool()].float().cpu()


def collect_logits(
    model: torch.nn.Module, batches: Sequence[Batch], what: str, progress: bool = False
) -> list[torch.Tensor]:
    """`token_logits` of every batch: what a later model is compared with when this one is gone."""
    return [token_logits(model, b) for b in tqdm(batches, desc=f"logits of {what}", disable=not progress, leave=False)]


def compare(
    reference: Sequence[torch.Tensor], model: torch.nn.Module, batches: Sequence[Batch], progress: bool = False
) -> Parity:
    """The model against the reference's logits on the same batches."""
    largest, total_kl, agreed, count = 0.0, 0.0, 0, 0
    pairs = zip(reference, batches, strict=True)
    for expected_NV, batch in tqdm(pairs, total=len(batches), desc="parity", disable=not progress, leave=False):
        actual_NV = token_logits(model, batch)
        largest = max(largest, float((actual_NV - expected_NV).abs().max()))
        agreed += int((actual_NV.argmax(-1) == expected_NV.argmax(-1)).sum())
        count += len(actual_NV)
        for start in range(0, len(actual_NV), CHUNK):
            part = slice(start, start + CHUNK)
            total_kl += _sum_kl(expected_NV[part], actual_NV[part])
    return Parity(largest, total_kl / count, agreed / count, count)


def _sum_kl(expected_NV: torch.Tensor, actual_NV: torch.Tensor) -> float:
    """Summed over tokens, in float64: the limit lies where fp32 softmax differences are all rounding."""
    log_p_NV = expected_NV.double().log_softmax(-1)
    log_q_NV = actual_NV.double().log_softmax(-1)
    return float((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum())


def check_parity(parity: Parity, merge: MergeConfig) -> None:
    """Raises: ParityError: the merged model misses a limit of `merge.parity_*` (NaN misses both)."""
    misses = []
    if not parity.mean_kl <= merge.parity_max_mean_kl:
        misses.append(
            f"mean_kl {parity.mean_kl:.3e} nats a token, limit merge.parity_max_mean_kl {merge.parity_max_mean_kl:.0e}"
        )
    if not parity.top1_agreement >= merge.parity_min_top1_agreement:
        misses.append(
            f"top1_agreement {parity.top1_agreement:.6f}, limit merge.parity_min_top1_agreement "
            f"{merge.parity_min_top1_agreement}"
        )
    if misses:
        raise ParityError(
            f"the merged model is not the adapter on its training base ({parity.num_tokens} tokens, fp32, before "
            "the cast): "
            + "; ".join(misses)
            + f"; largest logit difference {parity.max_abs_logit_diff:.3e}. Nothing was saved. Do base, quantized "
            "base and "
            "adapter belong together (`dvc status`)? If they do, this is a bug of the merge: report it with lora.*."
        )


def check_differs(from_base: Parity) -> None:
    """Raises: ParityError: the merged model is its base; the negative control of the parity."""
    if from_base.max_abs_logit_diff == 0.0:
        raise ParityError(
            f"the merged model gives the base's own logits on all {from_base.num_tokens} tokens: the training is "
            "not in it. "
            "Nothing was saved. Look at metrics/train.json (did the loss fall?) and train again."
        )


def check_reloaded(reloaded: Parity, largest_logit: float, dtype: torch.dtype, folder: Path) -> None:
    """Compares what was saved, loaded again, with the model before saving, in the saved dtype.

    The weights are equal and so is the arithmetic, rounding apart where a kernel sums in another order: 1e-4 in fp32,
    in 16 bits two units in the last place of the largest logit (measured on a CPU: no difference).

    Raises:
        ParityError: a logit differs by more (NaN does).
    """
    limit = 1e-4 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps * largest_logit
    if not reloaded.max_abs_logit_diff <= limit:
        raise ParityError(
            f"{folder}: logits of the saved model differ by {reloaded.max_abs_logit_diff:.2e} from those before saving "
            f"({reloaded.num_tokens} tokens, limit {limit:.1e}). Nothing was saved. Is the disk sound? If it is, "
            "report this with the model's config.json and versions."
        )


@torch.no_grad()
def parity_loss(model: torch.nn.Module, batches: Sequence[Batch]) -> float:
    """Nats per supervised token of the batches."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for batch in batches:
        if batch.completion_mask.any():
            loss, num_tokens = supervised_loss(model, batch.to(device))
            total, count = total + loss.item(), count + num_tokens
    return total / count if count else 0.0
