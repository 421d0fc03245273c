"""The training loop: one page, on accelerate.

The loss of an optimizer step is summed over the supervised tokens of all its micro-batches and divided by their number, so
that how a step is cut into micro-batches does not change it.
"""

import logging
import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tqdm import tqdm

from pipeline.batching import Batch, collate
from pipeline.dataset import Split
from pipeline.guards import check_finite
from pipeline.losses import measure_loss, supervised_loss
from pipeline.schema import Keep, Optimizer, TrainConfig

logger = logging.getLogger(__name__)
Event = dict[str, float]
OnEvent = Callable[[int, Event], None]


@dataclass
class Progress:
    """What a training has seen and found so far."""

    history: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # nats per supervised token, one an optimizer step
    tokens_seen: int = 0  # padding not counted
    supervised_tokens_seen: int = 0
    training_seconds: float = 0.0  # validation not counted
    best_step: int = 0
    best_loss: float = math.inf
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    validations_since_best: int = 0


def num_steps(settings: TrainConfig, num_rows: int) -> int:
    """Optimizer steps of the whole training."""
    rows_a_step = settings.micro_batch_size * settings.gradient_accumulation_steps
    return settings.max_steps or max(1, math.ceil(settings.num_epochs * num_rows / rows_a_step))


def rows_of_step(num_rows: int, rows_a_step: int, seed: int, step: int) -> list[int]:
    """The rows of an optimizer step (from 0): consecutive pieces of one seeded permutation an epoch, epochs end to end."""
    first, last = step * rows_a_step, (step + 1) * rows_a_step
    rows: list[int] = []
    for epoch in range(first // num_rows, (last - 1) // num_rows + 1):
        order = np.random.default_rng([seed, epoch]).permutation(num_rows)
        start = epoch * num_rows
        rows += order[max(first - start, 0) : last - start].tolist()
    return rows


def micro_batches(split: Split, rows: list[int], size: int, pad_token_id: int) -> Iterator[Batch]:
    """The step's rows by length, longest first, so that a micro-batch pads little; rows with nothing to predict left out."""
    rows = sorted((r for r in rows if split.num_supervised[r]), key=lambda r: -split.lengths[r])
    for start in range(0, len(rows), size):
        yield collate(split, rows[start : start + size], pad_token_id)


def make_optimizer(settings: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), or bitsandbytes' with 8-bit states (arXiv 2110.02861), paged or not."""
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer is Optimizer.adamw:
        return torch.optim.AdamW(parameters, fused=True, **arguments)
    import bitsandbytes  # on a GPU machine without it, the other optimizers still run

    if settings.optimizer is Optimizer.paged_adamw_8bit and parameters[0].device.type == "cpu":
        logger.warning("train.optimizer: paged_adamw_8bit does not page on a CPU; the arithmetic is that of adamw_8bit")

    classes = {Optimizer.adamw_8bit: bitsandbytes.optim.AdamW8bit, Optimizer.paged_adamw_8bit: bitsandbytes.optim.PagedAdamW8bit}
    return classes[settings.optimizer](parameters, **arguments)


def train(
    model: torch.nn.Module,
    train_split: Split,
    validation_split: Split,
    settings: TrainConfig,
    pad_token_id: int,
    on_event: OnEvent,
    progress_bar: bool = True,
) -> Progress:
    """Trains the model's trainable parameters in place and leaves the kept weights (best or last) in it.

    Args:
        on_event: called with the step (1-based; 0 = before training) and its metrics, as they come.

    Raises:
        TrainingError: NaN or infinite loss or gradient.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # one process may train twice, with other precision
    precision = {None: "no", "bfloat16": "bf16", "float16": "fp16"}[settings.mixed_precision]
    accelerator = Accelerator(mixed_precision=precision, cpu=next(model.parameters()).device.type == "cpu")
    trainable = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model, make_optimizer(settings, trainable))
    total = num_steps(settings, len(train_split))
    warmup = warmup_steps(settings, total)
    name = "constant_with_warmup" if settings.lr_scheduler == "constant" else settings.lr_scheduler.value
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rows_a_step = settings.micro_batch_size * settings.gradient_accumulation_steps
    progress = Progress()

    def record(step: int, event: Event) -> None:
        progress.history.append({"step": step, **event})
        on_event(step, event)

    def validate(step: int) -> bool:
        """Measures, remembers the best, and says whether to stop early."""
        result = measure_loss(model, validation_rows, settings.micro_batch_size * 2, pad_token_id, progress_bar)
        record(step, {"validation.loss": result.loss})
        if result.loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.validations_since_best = result.loss, step, 0
            if settings.keep is Keep.best:
                progress.best_weights = {n: p.detach().cpu().clone() for n, p in _trainable(model)}
        else:
            progress.validations_since_best += 1
        bar.set_postfix(validation=f"{result.loss:.4f}", best=f"{progress.best_loss:.4f}")
        return settings.early_stopping_patience is not None and progress.validations_since_best >= settings.early_stopping_patience

    validation_rows = validation_split.head(settings.eval_max_rows)
    model.train()
    with tqdm(total=total, desc="train", unit="step", disable=not progress_bar) as bar:
        validate(0)
        for step in range(1, total + 1):
            started = time.perf_counter()
            rows = rows_of_step(len(train_split), rows_a_step, settings.seed, step - 1)
            num_tokens = int(train_split.num_supervised[rows].sum())
            step_loss = 0.0
            for batch in micro_batches(train_split, rows, settings.micro_batch_size, pad_token_id):
                with accelerator.autocast():
                    loss, _ = supervised_loss(model, batch.to(accelerator.device))
                accelerator.backward(loss / num_tokens)
                step_loss += loss.item() / num_tokens
            grad_norm = float(accelerator.clip_grad_norm_(trainable, settings.max_grad_norm or math.inf))
            check_finite(step_loss, grad_norm, step, train_split, rows)
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            progress.training_seconds += time.perf_counter() - started
            progress.tokens_seen += int(train_split.lengths[rows].sum())
            progress.supervised_tokens_seen += num_tokens
            progress.losses.append(step_loss)
            record(step, {"train.loss": step_loss, "train.learning_rate": learning_rate, "train.grad_norm": grad_norm})
            bar.update()
            if (step % settings.eval_steps == 0 or step == total) and validate(step):
                logger.info("stopped early at step %d: no better validation loss since step %d", step, progress.best_step)
                break
    if settings.keep is Keep.best:
        _restore(model, progress.best_weights)
    return progress


def warmup_steps(settings: TrainConfig, total: int) -> int:
    return math.ceil(settings.warmup_ratio * total)


def _trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


@torch.no_grad()
def _restore(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in _trainable(model):
        parameter.copy_(weights[name])


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: torch's allocations on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
