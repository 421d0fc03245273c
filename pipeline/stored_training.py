"""Trainings taken from the store, gone on with, or made anew; one alone or several together."""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import fit, store, tracking
from pipeline.errors import ConfigError, Interrupted, PipelineError, TrainingError
from pipeline.files import copy_folder, hash_once, write_json, write_jsonl, write_text
from pipeline.fingerprint import fingerprint, training_inputs
from pipeline.imports import code_hash
from pipeline.model_files import hash_model
from pipeline.provenance import check_provenance, write_provenance
from pipeline.schema import RunConfig, TrainMethod
from pipeline.tracking_runs import RunRecord
from pipeline.workspace import ADAPTER, PROCESSED, QUANTIZED, RUN, Workspace

if TYPE_CHECKING:
    import torch

    from pipeline.checkpoints import Checkpoints
    from pipeline.finetuning import Preparing
    from pipeline.ranks import Ranks
    from pipeline.tracking_live import LiveRun

logger = logging.getLogger(__name__)
OnEvent = Callable[[int, dict[str, float]], None]
FUSED = "pipeline.fused_finetuning"
FUSED_MARK = "fused_code"
LOADED_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Training:
    """One training that is wanted.

    Attributes:
        key: its fingerprint; `inputs`: what that is the hash of.
        on_event: is told of each event of the curves; what it raises ends the training.
        run: what MLflow is told of it.
        is_point: of a sweep: waits while another process trains the same, and shares the store's files.
        says: settings that the provenance names in the place of `config`, where it is no plain training.
        preparing: makes the model to train, where it is no plain training.
        figures: what `preparing` measured, once it is trained; for its metrics.
        is_planned: the memory plan knows what it takes.
    """

    config: RunConfig
    workspace: Workspace
    key: str
    inputs: dict[str, Any]
    run: RunRecord
    on_event: OnEvent | None = None
    is_point: bool = False
    says: RunConfig | None = None
    preparing: "Preparing | None" = None
    figures: Mapping[str, float] = field(default_factory=dict)
    is_planned: bool = True


@dataclass
class Trained:
    """Attributes:
    source: `new`, `resumed` or `store`.
    seconds: spent here.
    """

    source: str
    result: dict[str, Any]
    run_id: str | None = None
    seconds: float = 0.0


@dataclass
class _Open:
    """A training whose entry is locked and whose run is open."""

    training: Training
    folder: Path
    live: "LiveRun"
    outcome: Trained | PipelineError | None = field(default=None)


def check_inputs(config: RunConfig, workspace: Workspace) -> None:
    """Raises: ConfigError: processed data, or the quantized base to train on, made with other settings."""
    check_provenance(workspace.input(PROCESSED), config.data, config.model)
    if config.train.method is TrainMethod.qlora:
        check_provenance(workspace.input(QUANTIZED), config.model, config.quantization)


def identify(config: RunConfig, workspace: Workspace) -> tuple[str, dict[str, Any]]:
    """The training's fingerprint and what it is the hash of."""
    if config.train.method is TrainMethod.qlora:
        base = hash_once(workspace.input(QUANTIZED))
    else:
        base = hash_model(config.model)
    processed = workspace.input(PROCESSED)
    data = "".join(hash_once(processed / f"{split}.arrow") for split in LOADED_SPLITS)
    inputs = training_inputs(config, base, data)
    return fingerprint(inputs), inputs


def want(config: RunConfig, workspace: Workspace) -> Training:
    """The training of these settings, to be had by `train`."""
    key, inputs = identify(config, workspace)
    return Training(
        config, workspace, key, inputs, tracking.training_record(config, key, inputs, workspace.input(PROCESSED))
    )


def is_stored(config: RunConfig, workspace: Workspace) -> bool:
    """Whether the store has this training's result."""
    return finished(store.entry(identify(config, workspace)[0])) is not None


def assist(config: RunConfig, workspace: Workspace, device: "torch.device", ranks: "Ranks") -> None:
    """This process's share of a training that process 0 runs by `train`; nothing where that finds it in the store."""
    from pipeline.finetuning import finetune

    folder = ranks.from_main(None)
    if folder is not None:
        inputs = workspace.input(PROCESSED), workspace.input(QUANTIZED)
        finetune(config, *inputs, folder / "adapter", _checkpoints(config, folder), device, _ignore, ranks)


def _ignore(step: int, event: dict[str, float]) -> None:
    """Process 0 logs."""


def train(
    trainings: Sequence[Training], device: "torch.device", ranks: "Ranks | None" = None
) -> list[Trained | PipelineError]:
    """Trains what the store does not have, several together on one base, and writes what each leaves.

    Args:
        ranks: this is process 0 of several that train one; the others are in `assist`.

    Returns:
        For each, in their order, where it came from, or what stopped it alone.

    Raises:
        Interrupted: stopped; everything is kept that the next run needs.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        opened: dict[str, _Open] = {}
        for training in sorted(trainings, key=lambda each: each.key):  # one order for all: nobody waits in a circle
            folder = stack.enter_context(store.locked(training.key, wait=training.is_point))
            live = stack.enter_context(tracking.open_run(training.run, training.config.runtime))
            opened[training.key] = _Open(training, folder, live)
        for each in opened.values():
            result = finished(each.folder)
            if result is not None:
                name = each.training.key[:12]
                logger.info("taken from .training/%s: these settings, data, base and code were trained before", name)
                each.outcome = Trained("store", result)
        waiting = [opened[training.key] for training in trainings if opened[training.key].outcome is None]
        for each in waiting:  # a wait for the lock may have taken hours
            now = identify(each.training.config, each.training.workspace)[1]
            if each.training.inputs | now != each.training.inputs:
                each.outcome = TrainingError("data, base or code were changed meanwhile. Run the same command again.")
        waiting = [each for each in waiting if each.outcome is None]
        if waiting:
            _train(waiting, device, ranks)
        elif ranks is not None:
            ranks.from_main(None)  # nothing to do for the others
        for each in opened.values():
            if isinstance(each.outcome, Trained):
                each.outcome.run_id = _write(each, each.outcome.result)
                each.outcome.seconds = (time.perf_counter() - started) / len(trainings)
            else:
                each.live.close("FAILED")
        outcomes = [opened[training.key].outcome for training in trainings]
    return [outcome for outcome in outcomes if outcome is not None]


def _train(waiting: Sequence[_Open], device: "torch.device", ranks: "Ranks | None") -> None:
    """Trains them and puts what comes of each into the store."""
    from pipeline.finetuning import finetune
    from pipeline.fused_finetuning import Member, finetune_together
    from pipeline.ranks import ALONE

    asked = waiting[0].training.config.runtime.num_processes
    if asked > 1 and (ranks or ALONE).count == 1:
        raise ConfigError(
            f"runtime.num_processes: {asked}, but the points of a sweep are trained by one process each: "
            "set runtime=default."
        )

    members = []
    for each in waiting:
        checkpoints = _checkpoints(each.training.config, each.folder)
        _mark_fused(each.folder, is_fused=len(waiting) > 1)
        target = store.new_adapter_folder(each.folder)
        members.append(Member(each.training.config, target, checkpoints, _both(each.live.log, each.training.on_event)))
    planned = None
    are_resumed = [any(member.checkpoints.folder.glob("checkpoint-*")) for member in members]
    workspace = waiting[0].training.workspace
    processed, quantized = workspace.input(PROCESSED), workspace.input(QUANTIZED)
    if len(members) > 1:
        found = finetune_together(members, processed, quantized, device)
    else:
        (alone,) = members
        arguments = alone.adapter_folder, alone.checkpoints, device, alone.on_event
        (only,) = waiting
        if only.training.is_planned:
            planned = fit.planned_bytes(alone.config, processed)
        if ranks is not None:
            ranks.from_main(only.folder)
        try:
            found = [finetune(alone.config, processed, quantized, *arguments, ranks or ALONE, only.training.preparing)]
        except Interrupted:
            raise
        except PipelineError as error:
            found = [error]
    for each, is_resumed, outcome in zip(waiting, are_resumed, found, strict=True):
        if isinstance(outcome, PipelineError):
            each.outcome = outcome
            continue
        metrics, history = outcome
        if planned is not None:
            metrics["planned_memory_bytes"] = planned
        metrics |= each.training.figures
        result = {"metrics": metrics, "history": history, "inputs": each.training.inputs}
        mark = each.folder / FUSED_MARK
        if mark.exists():
            result["fused_code"] = mark.read_text(encoding="utf-8")
        store.finish(each.folder, result)
        each.outcome = Trained("resumed" if is_resumed else "new", result)


def _checkpoints(config: RunConfig, folder: Path) -> "Checkpoints":
    from pipeline.checkpoints import Checkpoints

    return Checkpoints(folder / "checkpoints", config.runtime.checkpoint_steps, config.runtime.checkpoints_kept)


def _mark_fused(folder: Path, is_fused: bool) -> None:
    """Notes which fused code had a part in the training; steps of another version are not gone on with."""
    mark, code = folder / FUSED_MARK, code_hash(FUSED)
    if mark.exists() and mark.read_text(encoding="utf-8") != code:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        mark.unlink()
    if is_fused:
        write_text(mark, code)


def _both(first: OnEvent, second: OnEvent | None) -> OnEvent:
    def on_event(step: int, event: dict[str, float]) -> None:
        first(step, event)
        if second is not None:
            second(step, event)

    return on_event


def finished(folder: Path) -> dict[str, Any] | None:
    """The result in the store's entry; None where there is none, or code for fused training has changed since."""
    result = store.finished(folder)
    if result is not None and result.get("fused_code", code := code_hash(FUSED)) != code:
        logger.info("%s: was trained by another version of %s: training again", folder.name[:12], FUSED)
        return None
    return result


def write_training(training: Training, folder: Path, result: Mapping[str, Any]) -> None:
    """Writes adapter, metrics and history from the store's entry into the training's workspace."""
    config, workspace = training.says or training.config, training.workspace
    adapter = workspace.output(ADAPTER)
    copy_folder(folder / "adapter", adapter, link=training.is_point)
    groups = (config.train, config.lora, config.quantization, config.model, config.data)
    hashes = {f"{name}_sha256": training.inputs[name] for name in ("base", "data")}
    way = {"way": training.inputs["way"]} if training.says is not None else {}
    write_provenance(adapter, "domains" if way else "train", *groups, **hashes, **way)
    write_json(workspace.output("metrics/train.json"), {**result["metrics"], "fingerprint": training.key})
    write_jsonl(workspace.output("reports/train/history.jsonl"), result["history"])


def _write(each: _Open, result: Mapping[str, Any]) -> str | None:
    """What a training leaves in its workspace; the run's id."""
    training = each.training
    shutil.rmtree(each.folder / "checkpoints", ignore_errors=True)  # a finished one may have been killed before this
    write_training(training, each.folder, result)
    run_id = each.live.close(system_file=training.workspace.output("reports/train/system.jsonl"))
    tracking.write_run(training.run, run_id, training.workspace.output(RUN))
    return run_id
