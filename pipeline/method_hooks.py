"""Where a training method has a part in the loop beside its layers: it overrides what it needs."""

from pathlib import Path
from typing import Any

import torch

from pipeline.batching import Batch
from pipeline.losses import ForwardPlan, supervised_loss


class MethodHooks:
    """What a method does in a training; this one does nothing.

    A resumed training has to be the same training: what is random follows from `train.seed` and the step, and whatever
    else is remembered goes through `state` and `load_state`. A step may be done again in smaller micro-batches.
    """

    def before_micro_batch(self, step: int, number: int) -> None:
        """Before the forward of micro-batch `number` of optimizer step `step`, both from 0, over all processes."""

    def loss(self, model: torch.nn.Module, batch: Batch, plan: ForwardPlan) -> tuple[torch.Tensor, int]:
        """The summed loss of a micro-batch in training, nats, and its supervised tokens."""
        return supervised_loss(model, batch, plan)

    def penalty(self) -> torch.Tensor | None:
        """Scalar added to a step's mean loss, once; None: nothing."""
        return None

    def after_backward(self) -> None:
        """The step's gradient is whole; it is clipped next."""

    def after_update(self, step: int) -> None:
        """Optimizer step `step` (from 1) is over; its gradient is still there, None where no update was made of it."""

    def may_be_kept(self, step: int) -> bool:
        """Whether the weights after `step` are what the method promises, so that they may be kept as the best."""
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold besides weights and optimizer: tensors and plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` gave."""

    def after_save(self, folder: Path) -> None:
        """The adapter is in `folder`, in PEFT format: makes of it what users load."""


NO_HOOKS = MethodHooks()
