"""Whether the configured training fits the device, from config.json alone. The stages ask through `pipeline.fit`."""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.architecture import Architecture, read_architecture
from pipeline.dataset import load_split
from pipeline.device_memory import free_bytes
from pipeline.errors import ConfigError, ModelError, PipelineError
from pipeline.memory import Setup, plan_memory, setup_of, smallest, usable_bytes
from pipeline.model_files import model_folder
from pipeline.modeling import load_config
from pipeline.plan_cards import CARDS
from pipeline.plan_columns import Totals
from pipeline.plan_models import sizes
from pipeline.quantized_layers import FOUR_BIT
from pipeline.runtime import torch_dtype
from pipeline.schema import (
    Device,
    KeepQuantized,
    OnMisfit,
    Optimizer,
    QuantizationMethod,
    RunConfig,
    RuntimeConfig,
    TrainMethod,
)
from pipeline.training import micro_batch_rows, num_steps, rows_of_step

logger = logging.getLogger(__name__)
STEPS_LOOKED_AT = 100  # for the fullest micro-batch


def device_type(runtime: RuntimeConfig) -> str:
    """`cuda` or `cpu`: what `select_device` takes; `cuda` too where it is asked for and missing."""
    wants_cuda = runtime.device is Device.cuda or (runtime.device is Device.auto and torch.cuda.is_available())
    return "cuda" if wants_cuda else "cpu"


def check_fit(config: RunConfig, processed: Path | None) -> None:
    """See `pipeline.fit.check_fit`.

    What the engine does by itself when memory runs out (`memory.smallest`) is no misfit: there it warns. Before there
    are processed data, the base has to be quantised yet, for which it is held whole: that is looked at, too.
    """
    runtime = config.runtime
    device = device_type(runtime)
    if device == "cuda" and not torch.cuda.is_available():
        logger.info("fit: no GPU here (runtime.device=cuda): whether the training fits is checked where it runs")
        return
    architecture = _architecture(config)
    capacity = capacity_bytes(runtime, device)
    length = longest_row(processed) if processed else config.data.max_length
    setup = _setup(config, architecture, device, length, capacity)
    usable = usable_bytes(capacity, device)
    try:
        planned = plan_memory(architecture, setup).total
        is_misfit = planned > usable and plan_memory(architecture, smallest(setup)).total > usable
    except ModelError as error:
        logger.warning("fit: not planned, so not checked: %s", error)
        return
    problem = None if processed else _loading_problem(config, architecture, device)
    if is_misfit:
        problem = _misfit(architecture, setup, capacity)
    if problem is not None and runtime.on_misfit is OnMisfit.fail:
        raise ConfigError(problem)
    if problem is not None:
        logger.warning("%s", problem)
    elif planned > usable:
        logger.warning("%s", _squeezed(architecture, setup, planned, usable))


def planned_bytes(config: RunConfig, processed: Path) -> int | None:
    """See `pipeline.fit.planned_bytes`."""
    device = device_type(config.runtime)
    architecture = _architecture(config)
    capacity = capacity_bytes(config.runtime, device)
    setup = _setup(config, architecture, device, fullest_length(config, processed), capacity)
    try:
        return plan_memory(architecture, setup).total
    except ModelError as error:
        logger.warning("no planned memory: %s", error)
        return None


def longest_row(processed: Path) -> int:
    """Tokens of the longest row that training or its validation sees."""
    return max(int(load_split(processed, name).lengths.max(initial=1)) for name in ("train", "validation"))


def fullest_length(config: RunConfig, processed: Path) -> int:
    """Mean tokens a row of the fullest micro-batch in the first steps: rows lie end to end, so that is what counts."""
    split, train = load_split(processed, "train"), config.train
    rows_a_step = train.micro_batch_size * train.gradient_accumulation_steps
    fullest = 1
    for step in range(min(STEPS_LOOKED_AT, num_steps(train, len(split)))):
        rows = rows_of_step(len(split), rows_a_step, train.seed, step)
        for piece in micro_batch_rows(split, rows, train.micro_batch_size):
            fullest = max(fullest, int(split.lengths[piece].sum()))
    return math.ceil(fullest / train.micro_batch_size)


def capacity_bytes(runtime: RuntimeConfig, device: str) -> int:
    """Memory that is free for one process: of its GPU, or its share of the machine's."""
    return free_bytes(device) // (1 if device == "cuda" else max(1, runtime.num_processes // runtime.num_machines))


def _architecture(config: RunConfig) -> Architecture:
    trusts = config.model.trust_remote_code
    folder = model_folder(config.model, weights=False)
    return read_architecture(load_config(folder, trusts), config.model.hub_id or folder.name, trusts)


def _setup(config: RunConfig, architecture: Architecture, device: str, length: int, capacity: int) -> Setup:
    """As configured, with the base kept in few bits where `load_training_base` would."""
    keep, quantization = config.runtime.keep_quantized, config.quantization
    if config.train.method is not TrainMethod.qlora or keep is KeepQuantized.never:
        keeps = False
    elif keep is KeepQuantized.always:
        keeps = True
    else:
        dequantized = architecture.num_parameters * torch_dtype(quantization.compute_dtype).itemsize
        keeps = device == "cuda" and quantization.method in FOUR_BIT and dequantized > capacity / 2
    length = min(length, architecture.max_context or length)
    return setup_of(config, device, length=length, keeps_quantized=keeps)


def _loading_problem(config: RunConfig, architecture: Architecture, device: str) -> str | None:
    """Quantising holds the base as it is, on the GPU or else in main memory."""
    if config.quantization.method is QuantizationMethod.none:
        return None
    needed = architecture.num_parameters * torch_dtype(config.model.dtype).itemsize
    free = max(free_bytes("cpu"), free_bytes(device))
    if needed <= free:
        return None
    return (
        f"model: {architecture.name} takes {_gb(needed)} in {config.model.dtype} while it is quantised, and "
        f"{_gb(free)} are free here. Quantise it on a machine with more memory (`dvc repro quantize` there, then "
        "`dvc push`), or take a smaller model. runtime.on_misfit=warn goes on all the same."
    )


def _misfit(architecture: Architecture, setup: Setup, capacity: int) -> str:
    memory = plan_memory(architecture, smallest(setup))
    parts = {"weights": memory.weights + memory.scales, "adapter": memory.adapter, "gradients": memory.gradients}
    parts |= {"optimizer": memory.optimizer, "activations, logits and workspace": memory.total - memory.states}
    listing = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size > 0)
    where = f"{torch.cuda.get_device_name()} has" if setup.device == "cuda" else "this machine has"
    remedies = list(_remedies(architecture, setup, capacity)) or ["nothing that one change would reach"]
    listed = "\n".join(f"  {line}" for line in remedies)
    return (
        f"the training cannot fit: {_gb(memory.total)} are planned with one row of {setup.length} tokens at a time and "
        f"activations recomputed ({listing}); {where} {_gb(capacity)} free for it. What would fit:\n{listed}\n"
        "`python -m pipeline.plan` with the same settings shows all of it. runtime.on_misfit=warn goes on all the same."
    )


def _remedies(architecture: Architecture, setup: Setup, capacity: int) -> Iterator[str]:
    """Each change that is enough alone, and what it takes."""
    usable, least = usable_bytes(capacity, setup.device), smallest(setup)
    eight_bit = replace(setup.train, optimizer=Optimizer.paged_adamw_8bit)
    nf4 = replace(setup.quantization, method=QuantizationMethod.nf4, double_quant=True)
    kept = replace(least, method=TrainMethod.qlora, quantization=nf4, keeps_quantized=True)
    changes = {"train.optimizer=paged_adamw_8bit": replace(least, train=eight_bit)}
    if setup.method is TrainMethod.qlora and setup.quantization.method in FOUR_BIT:
        changes["runtime.keep_quantized=always"] = replace(least, keeps_quantized=True)
    else:
        changes["train.method=qlora quantization=nf4 runtime.keep_quantized=always"] = kept
    for change, tried in changes.items():
        if tried != least and (total := plan_memory(architecture, tried).total) <= usable:
            yield f"{change} ({_gb(total)})"
    length = Totals(architecture, least).largest_length(usable) // 8 * 8
    if 8 <= length < least.length and plan_memory(architecture, replace(least, length=length)).total <= usable:
        yield f"data.max_length={length}"
    for size in reversed(sizes().values()):
        if size.num_parameters >= architecture.num_parameters:
            continue
        try:
            total = plan_memory(read_architecture(size.model_config(), size.name), least).total
        except PipelineError:  # lora.target_modules that this one does not have
            continue
        if total <= usable:
            yield f"a smaller model, such as one of the size of {size.name} ({_gb(total)})"
            break
    needed = plan_memory(architecture, replace(least, device="cuda")).total
    cards = [card.gigabytes for card in CARDS if usable_bytes(int(card.gigabytes * 1e9), "cuda") >= needed]
    if cards:
        yield f"a card of {min(cards):g} GB"


def _squeezed(architecture: Architecture, setup: Setup, planned: int, usable: int) -> str:
    """What will come of a micro-batch that is too large, found as `Trainer.take_less_memory` finds it."""
    fitting = setup
    while plan_memory(architecture, fitting).total > usable and fitting != smallest(fitting):
        if fitting.micro_batch_size > 1:
            fitting = replace(fitting, micro_batch_size=math.ceil(fitting.micro_batch_size / 2))
        else:
            fitting = replace(fitting, gradient_checkpointing=True)
    train, size = setup.train, fitting.micro_batch_size
    steps = math.ceil(train.gradient_accumulation_steps * train.micro_batch_size / size)
    remedy = f"train.micro_batch_size={size} train.gradient_accumulation_steps={steps}"
    if fitting.gradient_checkpointing and not setup.gradient_checkpointing:
        remedy += " train.gradient_checkpointing=true"
    start = f"{_gb(planned)} are planned for train.micro_batch_size={setup.micro_batch_size}, {_gb(usable)} are free: "
    if setup.device == "cuda":
        recomputed = " with activations recomputed" if "checkpointing" in remedy else ""
        return start + f"when memory runs out, micro-batches of {size}{recomputed} will be used, with the same result"
    return start + f"Linux may end the training when memory runs out; set {remedy}, which gives the same result"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
