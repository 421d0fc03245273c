"""Optimizers and schedules by name."""

import logging
import math
from typing import Any

import torch
import transformers

from pipeline.schema import Optimizer, Scheduler, TrainConfig

logger = logging.getLogger(__name__)


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
    from pipeline.bnb import bnb  # on a GPU machine without it, the other optimizers still run

    if settings.optimizer is Optimizer.paged_adamw_8bit and parameters[0].device.type == "cpu":
        logger.warning("train.optimizer: paged_adamw_8bit does not page on a CPU; the arithmetic is that of adamw_8bit")
        return bnb.optim.AdamW8bit(parameters, **arguments)
    classes = {Optimizer.adamw_8bit: bnb.optim.AdamW8bit, Optimizer.paged_adamw_8bit: bnb.optim.PagedAdamW8bit}
    return classes[settings.optimizer](parameters, **arguments)


def make_scheduler(
    settings: TrainConfig, optimizer: torch.optim.Optimizer, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up from 0, then cosine or linear to 0, or constant."""
    constant = settings.lr_scheduler is Scheduler.constant
    name = "constant_with_warmup" if constant else settings.lr_scheduler.value
    warmup = warmup_steps(settings, num_steps)
    return transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)


def warmup_steps(settings: TrainConfig, num_steps: int) -> int:
    return math.ceil(settings.warmup_ratio * num_steps)
