"""Whether the configured training fits the device, from config.json alone. The stages ask through `pipeline.fit`."""

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.architecture import Architecture, read_architecture
from pipeline.dataset import load_split
from pipeline.device_memory import free_bytes, total_bytes
from pipeline.errors import ConfigError, ModelError, PipelineError
from pipeline.memory import (
    CUDA_CONTEXT_BYTES,
    Setup,
    keeps_quantized,
    plan_memory,
    setup_of,
    smallest,
    usable_bytes,
)
from pipeline.model_files import model_folder
from pipeline.modeling import load_config
from pipeline.plan_cards import smallest_size
from pipeline.plan_columns import Totals, rows_a_process
from pipeline.plan_models import sizes
from pipeline.quantized_layers import FOUR_BIT
from pipeline.runtime import torch_dtype
from pipeline.schema import (
    Device,
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


def check_fit(config: RunConfig, processed: Path | None, loads_base: bool) -> None:
    """See `pipeline.fit.check_fit`.

    What the engine does by itself when memory runs out (`memory.smallest`) is no misfit: there it warns. Of several
    processes none does. Before there are processed data, the base has to be quantised yet, for which it is held whole:
    that is looked at, too.
    """
    runtime = config.runtime
    device = device_type(runtime)
    if device == "cuda" and not torch.cuda.is_available():
        logger.info("fit: no GPU here (runtime.device=cuda): whether the training fits is checked where it runs")
        return
    try:
        problem, warning = _findings(config, processed, device)
    except PipelineError:
        raise
    except Exception as error:  # a plan is no reason for a training not to run
        logger.warning("fit: not planned, so not checked: %s", _reason(error))
        return
    is_early = processed is None and not loads_base
    if problem is not None and is_early and runtime.device is Device.auto:
        logger.warning("%s\nThis machine may not be the one that trains: going on.", problem)
    elif problem is not None and runtime.on_misfit is OnMisfit.fail:
        raise ConfigError(problem)
    elif problem or warning:
        logger.warning("%s", problem or warning)


def _findings(config: RunConfig, processed: Path | None, device: str) -> tuple[str | None, str | None]:
    """What keeps the training from running, and else what is to be said; None: nothing."""
    architecture = _architecture(config)
    capacity = capacity_bytes(config.runtime, device, is_now=processed is not None)
    length = longest_row(processed) if processed else config.data.max_length
    setup = _setup(config, architecture, device, length, capacity)
    usable = usable_bytes(capacity, device)
    try:
        planned = plan_memory(architecture, setup).total
        least = planned
        if planned > usable and setup.num_processes == 1:
            least = plan_memory(architecture, smallest(setup)).total
        problem = None if processed else _loading_problem(config, architecture, device)
        if least > usable:
            problem = _misfit(architecture, setup, capacity, is_now=processed is not None)
        warning = _squeezed(architecture, setup, planned, usable) if planned > usable >= least else None
    except ModelError as error:
        logger.warning("fit: not planned, so not checked: %s", error)
        return None, None
    return problem, warning


def planned_bytes(config: RunConfig, processed: Path) -> int | None:
    """See `pipeline.fit.planned_bytes`. Raises nothing: the training is done when it is asked for."""
    try:
        device = device_type(config.runtime)
        architecture = _architecture(config)
        capacity = capacity_bytes(config.runtime, device)
        setup = _setup(config, architecture, device, fullest_length(config, processed), capacity)
        return plan_memory(architecture, setup).total
    except Exception as error:
        logger.warning("no planned memory: %s", _reason(error))
        return None


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"


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
        for piece in micro_batch_rows(split, rows, train.micro_batch_size, config.runtime.num_processes):
            fullest = max(fullest, int(split.lengths[piece].sum()))
    return math.ceil(fullest / rows_a_process(config))


def capacity_bytes(runtime: RuntimeConfig, device: str, is_now: bool = True) -> int:
    """Memory for one process, of its GPU or its share of the machine's: what is free now, or would be with all free."""
    if device == "cuda":
        return free_bytes(device) if is_now else max(0, total_bytes(device) - CUDA_CONTEXT_BYTES)
    return (free_bytes if is_now else total_bytes)(device) // max(1, runtime.num_processes // runtime.num_machines)


def _architecture(config: RunConfig) -> Architecture:
    trusts = config.model.trust_remote_code
    folder = model_folder(config.model, weights=False)
    return read_architecture(load_config(folder, trusts), config.model.hub_id or folder.name, trusts)


def _setup(config: RunConfig, architecture: Architecture, device: str, length: int, capacity: int) -> Setup:
    """As configured, with the rows that one process takes, and the base kept in few bits where training would."""
    quantization, keeps = config.quantization, False
    if config.train.method is TrainMethod.qlora:
        dequantized = architecture.num_parameters * torch_dtype(quantization.compute_dtype).itemsize
        decided = keeps_quantized(config.runtime, quantization.method, device)
        keeps = dequantized > capacity / 2 if decided is None else decided
    length = min(length, architecture.max_context or length)
    setup = setup_of(config, device, length=length, keeps_quantized=keeps)
    return replace(setup, micro_batch_size=rows_a_process(config))


def _loading_problem(config: RunConfig, architecture: Architecture, device: str) -> str | None:
    """Quantising holds the base as it is, on the GPU or else in main memory."""
    if config.quantization.method is QuantizationMethod.none:
        return None
    needed = architecture.num_parameters * torch_dtype(config.model.dtype).itemsize
    there = max(total_bytes("cpu"), total_bytes(device))
    if needed <= there:
        return None
    return (
        f"model: {architecture.name} takes {_gb(needed)} in {config.model.dtype} while it is quantised, and this "
        f"machine has {_gb(there)}. Quantise it on a machine with more memory (`dvc repro quantize` there, then "
        "`dvc push`), or take a smaller model. runtime.on_misfit=warn goes on all the same."
    )


def _misfit(architecture: Architecture, setup: Setup, capacity: int, is_now: bool) -> str:
    usable, least = usable_bytes(capacity, setup.device), smallest(setup)
    memory = plan_memory(architecture, least)
    if memory.total <= usable:  # several processes do not come down to it by themselves
        memory = plan_memory(architecture, setup)
        how = f"{setup.micro_batch_size} rows of {setup.length} tokens at a time in each process"
        remedies = [_smaller(setup, _fitting(architecture, setup, usable))]
    else:
        how = f"one row of {setup.length} tokens at a time and activations recomputed"
        remedies = list(_remedies(architecture, least, capacity))
    parts = {"weights": memory.weights + memory.scales, "adapter": memory.adapter, "gradients": memory.gradients}
    parts |= {"optimizer": memory.optimizer, "activations, logits and workspace": memory.total - memory.states}
    listing = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size > 0)
    where = f"{torch.cuda.get_device_name()} has" if setup.device == "cuda" else "this machine has"
    listed = "\n".join(f"  {line}" for line in remedies or ["nothing that one change would reach"])
    return (
        f"the training cannot fit: {_gb(memory.total)} are planned with {how} ({listing}); {where} {_gb(capacity)} "
        f"{'free for it' if is_now else 'for it'}. What would fit:\n{listed}\n"
        "`python -m pipeline.plan` with the same settings shows all of it. runtime.on_misfit=warn goes on all the same."
    )


def _remedies(architecture: Architecture, least: Setup, capacity: int) -> Iterator[str]:
    """Each change that is enough alone, and what it takes."""
    usable = usable_bytes(capacity, least.device)
    eight_bit = replace(least.train, optimizer=Optimizer.paged_adamw_8bit)
    nf4 = replace(least.quantization, method=QuantizationMethod.nf4, double_quant=True)
    kept = replace(least, method=TrainMethod.qlora, quantization=nf4, keeps_quantized=True)
    changes = {"train.optimizer=paged_adamw_8bit": replace(least, train=eight_bit)}
    if least.method is TrainMethod.qlora and least.quantization.method in FOUR_BIT:
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
    card = smallest_size(needed)
    if card is not None:
        yield f"a card of {card:g} GB"


def _squeezed(architecture: Architecture, setup: Setup, planned: int, usable: int) -> str:
    """What will come of a micro-batch that is too large."""
    fitting = _fitting(architecture, setup, usable)
    start = f"{_gb(planned)} are planned for train.micro_batch_size={setup.micro_batch_size}, {_gb(usable)} are free: "
    if setup.device == "cuda" and setup.num_processes == 1:
        recomputes = fitting.gradient_checkpointing and not setup.gradient_checkpointing
        how = f"micro-batches of {fitting.micro_batch_size}" + (" with activations recomputed" if recomputes else "")
        return start + f"when memory runs out, {how} will be used, with the same result"
    return start + f"Linux may end the training when memory runs out; set {_smaller(setup, fitting)}"


def _fitting(architecture: Architecture, setup: Setup, usable: int) -> Setup:
    """The largest that fits, found as `Trainer.take_less_memory` finds it; `smallest` where none does."""
    while plan_memory(architecture, setup).total > usable and setup != smallest(setup):
        if setup.micro_batch_size > 1:
            setup = replace(setup, micro_batch_size=math.ceil(setup.micro_batch_size / 2))
        else:
            setup = replace(setup, gradient_checkpointing=True)
    return setup


def _smaller(setup: Setup, fitting: Setup) -> str:
    """The overrides for it; as many rows a step as before."""
    rows_a_step = setup.train.micro_batch_size * setup.train.gradient_accumulation_steps
    size = next(n for n in range(fitting.micro_batch_size, 0, -1) if rows_a_step % n == 0)
    remedy = f"train.micro_batch_size={size} train.gradient_accumulation_steps={rows_a_step // size}"
    if fitting.gradient_checkpointing and not setup.gradient_checkpointing:
        remedy += " train.gradient_checkpointing=true"
    return f"{remedy}, which gives the same result"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
