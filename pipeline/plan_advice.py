"""One recommendation, and its reasons."""

from dataclasses import dataclass, replace

from pipeline.architecture import Architecture
from pipeline.memory import Setup, plan_memory, usable_bytes
from pipeline.plan_cards import smallest_size
from pipeline.plan_columns import Column, rows_a_process
from pipeline.plan_time import Workload
from pipeline.schema import Dtype, RunConfig, TrainMethod

ROOM = 0.85  # of the usable memory: what LoRA in 16 bits may take before QLoRA is the better choice
WORTHWHILE_TOKENS = 2048  # a micro-batch of fewer keeps a GPU waiting: then rather recompute activations
SMALL_DATA, HIGH_RANK = 1000, 16  # rows under and rank over which overfitting is likely: a rule of thumb
MANY_DIGITS = 0.3  # of the answers' characters
SMALL_MODEL = 1_000_000_000


@dataclass(frozen=True)
class Advice:
    """Attributes:
    choice: one sentence. overrides: what to add to the command for it. reasons: one sentence each.
    """

    choice: str
    overrides: tuple[str, ...]
    reasons: tuple[str, ...]


def advise(
    architecture: Architecture,
    config: RunConfig,
    columns: dict[str, Column],
    workload: Workload,
    capacity_bytes: int,
    has_bfloat16: bool,
) -> Advice:
    """16-bit LoRA where it fits with room, else QLoRA, else what it would take."""
    lora, qlora = (_in_16_bits(columns[name], config, has_bfloat16) for name in ("lora", "qlora"))
    usable = usable_bytes(capacity_bytes, lora.setup.device)
    has_numbers = workload.digit_share is not None and workload.digit_share >= MANY_DIGITS
    choice, overrides = "", tuple[str, ...]()
    reasons: list[str] = []
    for column, room in ((lora, 1.0 if has_numbers else ROOM), (qlora, 1.0)):
        setup = _fitting(architecture, column, room * usable)
        if setup is None:
            reasons.append(_too_much(architecture, column, usable))
            continue
        total = plan_memory(architecture, setup).total
        choice = f"{_title(setup)}, {_as(setup, config)}: {_gb(total)} of {_gb(usable)} GB"
        overrides = _overrides(setup, config)
        if column is lora:
            reasons.append("the base fits as it is: faster than a quantised one, and nothing is lost by rounding it")
        break
    else:
        choice = "nothing on this device" + _elsewhere(architecture, qlora.setup)
    reasons += _about_data(config, workload, columns, has_numbers)
    if architecture.num_parameters < SMALL_MODEL:
        full = columns["full"]
        fits = "fits" if full.kept.fits or full.recomputed.fits else "does not fit here"
        reasons.append(
            f"under 1B parameters full fine-tuning is an option: it {fits} "
            f"({_gb(min(full.kept.memory.total, full.recomputed.memory.total))} GB; train.method=full)"
        )
    return Advice(choice, overrides, tuple(reasons))


def _title(setup: Setup) -> str:
    if setup.method is TrainMethod.qlora:
        return f"QLoRA computing in {setup.quantization.compute_dtype}"
    return f"LoRA on the base in {setup.model_dtype}"


def _in_16_bits(column: Column, config: RunConfig, has_bfloat16: bool) -> Column:
    """On a GPU computing in 16 bits, which its tensor cores are made for; on a CPU in the configured dtype."""
    setup, half = column.setup, Dtype.bfloat16 if has_bfloat16 else Dtype.float16
    if setup.device == "cpu":
        return replace(column, setup=replace(setup, model_dtype=config.model.dtype))
    dtype = setup.model_dtype if setup.model_dtype is not Dtype.bfloat16 or has_bfloat16 else half
    compute = setup.quantization.compute_dtype
    if compute is Dtype.float32 or (compute is Dtype.bfloat16 and not has_bfloat16):
        compute = half
    quantization = replace(setup.quantization, compute_dtype=compute)
    return replace(column, setup=replace(setup, model_dtype=dtype, quantization=quantization))


def _fitting(architecture: Architecture, column: Column, limit: float) -> Setup | None:
    """The setup nearest to the configured one of at most `limit` bytes: smaller micro-batches, then recomputing."""
    configured, rows = column.setup, column.setup.micro_batch_size
    rows_a_step = configured.train.micro_batch_size * configured.train.gradient_accumulation_steps
    sizes = [size for size in range(rows, 0, -1) if size == rows or rows_a_step % size == 0]
    kept = [size for size in sizes if size == rows or size * configured.length >= WORTHWHILE_TOKENS]
    options = [replace(configured, micro_batch_size=size) for size in kept]
    options += [replace(configured, micro_batch_size=size, gradient_checkpointing=True) for size in sizes]
    return next((setup for setup in options if plan_memory(architecture, setup).total <= limit), None)


def _as(setup: Setup, config: RunConfig) -> str:
    if setup.micro_batch_size == rows_a_process(config):
        size = "the configured micro-batch"
    else:
        size = f"micro-batches of {setup.micro_batch_size}"
    recomputed = setup.gradient_checkpointing and not config.train.gradient_checkpointing
    return size + (" and recomputed activations" if recomputed else "")


def _overrides(setup: Setup, config: RunConfig) -> tuple[str, ...]:
    """What changes against the configuration; rows of an optimizer step stay as they are."""
    train, found = config.train, []
    if setup.method is not train.method:
        found.append(f"train.method={setup.method}")
    if setup.method is TrainMethod.lora and setup.model_dtype is not config.model.dtype:
        found.append(f"model.dtype={setup.model_dtype}")
    if setup.method is TrainMethod.qlora and setup.quantization.method is not config.quantization.method:
        found.append(f"quantization={setup.quantization.method}")
    if setup.method is TrainMethod.qlora and setup.quantization.compute_dtype is not config.quantization.compute_dtype:
        found.append(f"quantization.compute_dtype={setup.quantization.compute_dtype}")
    if setup.micro_batch_size != rows_a_process(config):
        steps = train.gradient_accumulation_steps * train.micro_batch_size // setup.micro_batch_size
        found += [
            f"train.micro_batch_size={setup.micro_batch_size}",
            f"train.gradient_accumulation_steps={steps}",
        ]
    if setup.gradient_checkpointing != train.gradient_checkpointing:
        found.append("train.gradient_checkpointing=true")
    return tuple(found)


def _too_much(architecture: Architecture, column: Column, usable: int) -> str:
    least = plan_memory(architecture, replace(column.setup, micro_batch_size=1, gradient_checkpointing=True)).total
    if least > usable:
        return f"{_title(column.setup)} does not fit: {_gb(least)} GB even with one row at a time, of {_gb(usable)} GB"
    return (
        f"{_title(column.setup)} would leave too little room: {_gb(least)} of {_gb(usable)} GB with one row at a time"
    )


def _elsewhere(architecture: Architecture, setup: Setup) -> str:
    least = plan_memory(architecture, replace(setup, device="cuda", micro_batch_size=1, gradient_checkpointing=True))
    size = smallest_size(least.total)
    if size is not None:
        return f": QLoRA fits a card of {size:g} GB; or take a smaller model, or shorter rows (data.max_length)"
    return ", nor on one card of any size known here: take several (runtime=fsdp), or a smaller model"


def _about_data(config: RunConfig, workload: Workload, columns: dict[str, Column], has_numbers: bool) -> list[str]:
    found = []
    if workload.num_rows is not None and workload.num_rows < SMALL_DATA and config.lora.r > HIGH_RANK:
        found.append(
            f"{workload.num_rows:,} rows for r={config.lora.r} ({columns['lora'].trainable_parameters:,} trainable "
            "parameters) overfit easily: try lora.r=8, watch the validation loss (train.early_stopping_patience=3)"
        )
    if has_numbers:
        found.append(
            f"{100 * (workload.digit_share or 0):.0f} % of the answers' characters are digits: rounding the base costs "
            "such tasks more than others; where 16 bits do not fit, compare with quantization=int8"
        )
    return found


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f}" if num_bytes >= 1e9 else f"{num_bytes / 1e9:.2f}"
