"""Cross entropy over supervised tokens, summed; and its measurement on a split.

Logits of a large vocabulary are the largest tensor of a training. Only positions that predict a supervised token reach
the output head here, and those a chunk at a time, computed once more in the backward pass.

Shape suffixes: B rows, T tokens, K kept positions, S supervised ones, C those of a chunk, X hidden size, V vocabulary.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from pipeline.batching import Batch, collate, rows_by_length
from pipeline.dataset import Split
from pipeline.errors import DataError
from pipeline.fused_lora import fused_lora
from pipeline.native_layers import native_layers
from pipeline.packing import agree, eval_mode, inner_model, model_inputs, packed_attention, probe_batch
from pipeline.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)
CHUNK_ELEMENTS = 2**24  # logits of a chunk: 64 MiB in float32


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


@dataclass(frozen=True)
class ForwardPlan:
    """How batches go through a model, as `plan_forward` found it.

    Attributes:
        packed: rows end to end; else padded to the longest.
        chunked: logits a chunk of positions at a time; else those of all supervised positions at once.
    """

    packed: bool = False
    chunked: bool = False


@contextmanager
def plan_forward(model: torch.nn.Module, chunked: bool = True) -> Iterator[ForwardPlan]:
    """The fastest way by which this model computes the same logits, tried on a few tokens; good while inside.

    Args:
        chunked: the output head may be called outside the model's forward, by one process more often than by another.
    """
    with native_layers(inner_model(model)), fused_lora(model), packed_attention(model) as packed:
        yield ForwardPlan(packed, chunked and _chunks_agree(inner_model(model), packed))


def supervised_logits(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own logits that predict the supervised tokens, float32 [S, V], and these tokens, int64 [S].

    Prompts get no logits: only positions that some row supervises reach the output head (`logits_to_keep`).
    """
    predicts_BT = _predicts(batch)
    positions_K = predicts_BT.any(dim=0).nonzero().squeeze(1)
    output = model(**model_inputs(batch), logits_to_keep=positions_K)
    counted_BK = predicts_BT[:, positions_K]
    return output.logits[counted_BK].float(), batch.input_ids[:, positions_K + 1][counted_BK]


def _predicts(batch: Batch) -> torch.Tensor:
    """bool [B, T]: position t predicts token t + 1, and that one is supervised."""
    return F.pad(batch.completion_mask[:, 1:], (0, 1))


def supervised_loss(
    model: torch.nn.Module, batch: Batch, plan: ForwardPlan = ForwardPlan()
) -> tuple[torch.Tensor, int]:
    """The summed cross entropy (float32 scalar, nats) over the batch's supervised tokens, and their number.

    A sum, not a mean: dividing by the tokens of the whole effective batch is right for unequal completions,
    the mean of micro-batch means is not. One mask makes both numbers.
    """
    if not plan.chunked:
        logits_SV, targets_S = supervised_logits(model, batch)
        return F.cross_entropy(logits_SV, targets_S, reduction="sum"), targets_S.numel()
    hidden_SX, targets_S, logits_of = supervised_hidden(model, batch)

    def chunk_loss(hidden_CX: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_of(hidden_CX), targets_C, reduction="sum")

    size = chunk_size(model)
    if len(targets_S) <= size:
        return chunk_loss(hidden_SX, targets_S), targets_S.numel()
    chunks = zip(hidden_SX.split(size), targets_S.split(size), strict=True)
    losses = [checkpoint(chunk_loss, hidden, targets, use_reentrant=False) for hidden, targets in chunks]
    return torch.stack(losses).sum(), targets_S.numel()


def supervised_hidden(
    model: torch.nn.Module, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """What the output head gets for the supervised tokens, [S, X]; these tokens; and hidden states to logits."""
    positions_S = _predicts(batch).flatten().nonzero().squeeze(1)
    head = _output_head(model)
    with _head_left_out(head) as given:
        model(**model_inputs(batch))
    hidden_SX = given[0].flatten(0, 1).index_select(0, positions_S)
    after = _after_head(inner_model(model).config.get_text_config())

    def logits_of(hidden_CX: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(hidden_CX.device.type):  # a forward that autocasts by itself ends in bf16
            hidden_CX = hidden_CX.to(head.weight.dtype)
        return after(head(hidden_CX)).float()

    return hidden_SX, batch.input_ids.flatten()[positions_S + 1], logits_of


@contextmanager
def _head_left_out(head: Any) -> Iterator[list[torch.Tensor]]:
    """The model's forward ends before its output head; what that would have been given is in the list."""
    given: list[torch.Tensor] = []
    own = head.__dict__.get("forward")

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        given.append(hidden)
        return hidden[..., :0].clone()  # a view would have FSDP warn

    head.forward = keep
    try:
        yield given
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def chunk_size(model: torch.nn.Module) -> int:
    """Positions whose logits are held at once, at most."""
    return max(1, CHUNK_ELEMENTS // _output_head(model).weight.shape[0])


def _output_head(model: torch.nn.Module) -> Any:
    return inner_model(model).get_output_embeddings()


def _after_head(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a few architectures do to the head's product; `_chunks_agree` finds those that do anything else."""
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    factor = getattr(config, "logit_scale", None) or 1.0  # Cohere
    factor /= getattr(config, "logits_scaling", None) or 1.0  # Granite

    def after(logits: torch.Tensor) -> torch.Tensor:
        logits = logits if factor == 1.0 else logits * factor
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return after


@torch.no_grad()
def _chunks_agree(model: torch.nn.Module, packed: bool) -> bool:
    if _output_head(model) is None:
        return False
    batch = probe_batch(model, packed)
    try:
        with eval_mode(model):
            expected_SV, _ = supervised_logits(model, batch)
            hidden_SX, _, logits_of = supervised_hidden(model, batch)
            same = agree(model, logits_of(hidden_SX), expected_SV)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        logger.info("output head: %s: %s", type(error).__name__, error)
        same = False
    if not same:
        logger.warning(
            "logits of all supervised positions are held at once: this model's output head is of its own kind"
        )
    return same


@torch.no_grad()
def supervised_nats(model: torch.nn.Module, batch: Batch, plan: ForwardPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of every supervised token, float32 [S], and the row of the batch that it stands in, int64 [S]."""
    positions_S = _predicts(batch).flatten().nonzero().squeeze(1)
    rows_S = positions_S // batch.input_ids.shape[1]
    if batch.cu_seq_lens is not None:
        rows_S = torch.searchsorted(batch.cu_seq_lens[1:], positions_S, right=True)
    return token_nats(model, batch, plan), rows_S


def token_nats(model: torch.nn.Module, batch: Batch, plan: ForwardPlan) -> torch.Tensor:
    """Nats of every supervised token, row after row, float32 [S]; with a gradient where one is asked for."""
    if not plan.chunked:
        logits_SV, targets_S = supervised_logits(model, batch)
        return F.cross_entropy(logits_SV, targets_S, reduction="none")
    hidden_SX, targets_S, logits_of = supervised_hidden(model, batch)

    def chunk_nats(hidden_CX: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_of(hidden_CX), targets_C, reduction="none")

    size = chunk_size(model)
    if len(targets_S) <= size:
        return chunk_nats(hidden_SX, targets_S)
    chunks = zip(hidden_SX.split(size), targets_S.split(size), strict=True)
    return torch.cat([checkpoint(chunk_nats, hidden, targets, use_reentrant=False) for hidden, targets in chunks])


def measure_rows(
    model: torch.nn.Module,
    split: Split,
    batch_size: int,
    pad_token_id: int,
    progress: bool = False,
    plan: ForwardPlan | None = None,
    ranks: Ranks = ALONE,
) -> np.ndarray:
    """Nats of each row's supervised tokens, float64 [rows]; the model's train or eval mode is put back.

    Args:
        plan: of a caller that is inside `plan_forward`; None: found here.
        ranks: processes that share the rows; all get all rows' nats.

    Raises:
        DataError: the split has no supervised token.
    """
    if not split.num_supervised.sum():
        raise DataError(f"split {split.name}: no supervised token to measure a loss on. Look at metrics/prepare.json.")
    device = next(model.parameters()).device
    nats = np.zeros(len(split))
    with eval_mode(model), plan_forward(model) if plan is None else nullcontext(plan) as plan:
        shares = list(ranks.share(list(rows_by_length(split, batch_size))))
        for rows, counts in tqdm(shares, desc=f"loss on {split.name}", disable=not progress, leave=False):
            batch = collate(split, rows, pad_token_id, plan.packed)
            nats_S, rows_S = supervised_nats(model, batch.to(device), plan)
            if counts:
                sums = torch.bincount(rows_S.cpu(), nats_S.double().cpu(), minlength=len(rows))
                nats[rows] = sums.numpy()
    return np.asarray(ranks.total(nats.tolist()))


def measure_loss(
    model: torch.nn.Module,
    split: Split,
    batch_size: int,
    pad_token_id: int,
    progress: bool = False,
    plan: ForwardPlan | None = None,
    ranks: Ranks = ALONE,
) -> Loss:
    """Loss of the model on every row of the split; arguments and errors as of `measure_rows`."""
    nats = measure_rows(model, split, batch_size, pad_token_id, progress, plan, ranks)
    count = int(split.num_supervised.sum())
    return Loss(float(nats.sum()) / count, count)
