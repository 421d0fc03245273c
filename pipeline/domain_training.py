"""A domain's training: what makes it another one than `stages.train` would do, for the store of trainings."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline import store, stored_training
from pipeline.errors import PipelineError
from pipeline.fingerprint import fingerprint
from pipeline.fit import check_fit
from pipeline.schema import DomainMethod, RunConfig, TrainMethod
from pipeline.workspace import PROCESSED, Workspace

if TYPE_CHECKING:
    import torch

    from pipeline.domain_ways import Training

logger = logging.getLogger(__name__)


def train_domain(wanted: stored_training.Training, device: "torch.device") -> stored_training.Trained:
    """Trains it, or takes it from the store, and writes adapter, metrics and run into its workspace.

    Args:
        wanted: as `want_domain` gives it.

    Raises:
        PipelineError: what `pipeline.finetuning.finetune` raises.
        Interrupted: stopped, with a checkpoint.
    """
    if not store.is_finished(wanted.key):
        _check_fit(wanted)
    (trained,) = stored_training.train([wanted], device)
    if isinstance(trained, PipelineError):
        raise trained
    return trained


def _check_fit(wanted: stored_training.Training) -> None:
    method = wanted.config.domains.method
    if not wanted.is_planned:
        logger.info(
            "fit: not planned: %s takes more memory than LoRA, about as much as full fine-tuning or more", method
        )
        return
    if wanted.preparing is not None and method is DomainMethod.orthogonal:
        logger.info("fit: planned without the frozen earlier adapters")
    check_fit(wanted.config, wanted.workspace.input(PROCESSED))


def want_domain(
    config: RunConfig, workspace: Workspace, training: "Training", names: Sequence[str]
) -> stored_training.Training:
    """The training as `stages.train` would do it; what is this way's own makes another fingerprint of it.

    Args:
        names: of the domains until now, this one with them.
    """
    plain = dataclasses.replace(stored_training.want(config, workspace), is_point=True)
    if training.preparing is None:
        return plain
    inputs = plain.inputs | training.inputs
    key = fingerprint(inputs)
    name = f"{plain.run.run_name.rpartition(' · ')[0]} · {key[:6]}"
    tags = plain.run.tags | {"fingerprint": key, "domains": training.way, "domains.names": ", ".join(names)}
    run = dataclasses.replace(plain.run, fingerprint=key, run_name=name, tags=tags)
    says = dataclasses.replace(config, data=dataclasses.replace(config.data, domains=list(names)))
    if training.way == DomainMethod.osf:  # a whole model is what it leaves
        says = dataclasses.replace(says, train=dataclasses.replace(config.train, method=TrainMethod.full))
    return dataclasses.replace(
        plain, key=key, inputs=inputs, run=run, says=says, preparing=training.preparing, figures=training.figures,
        is_planned=training.way != DomainMethod.osf,
    )  # fmt: skip
