"""How long a training takes: tokens, FLOPs a token, and the FLOP rate that a device reaches."""

import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from pipeline.architecture import Architecture
from pipeline.conversations import Conversation, parse_row
from pipeline.dataset import load_split
from pipeline.errors import ConfigError, DataError
from pipeline.memory import Setup, flops_per_token
from pipeline.provenance import check_provenance
from pipeline.rows import RawRow, read_rows
from pipeline.schema import DataConfig, Dtype, RunConfig, TrainMethod
from pipeline.training import num_steps

# Of a data sheet's dense bf16 rate. Published for LoRA on Llama 3.1 8B: 0.53 (axolotl) and 0.56 (LLMForge), on 4 A100
# with fused kernels (Anyscale's benchmark), which this engine does not have.
UTILISATION = 0.4
# An NF4 base kept in 4 bits adds 665 / M to the time on an H100 (350 / M on an A100), with M tokens a micro-batch.
DEQUANTISATION = 665
NUM_SAMPLED = 500  # rows whose answers are looked at
MEASURED_FLOPS = 2e10  # of one matmul that is timed, at most: a second or two on a few CPU cores


@dataclass(frozen=True)
class Workload:
    """What there is to train on.

    Attributes:
        num_rows: None where it is not known.
        tokens_a_row: their mean; without processed data `data.max_length`, which no row exceeds.
        longest_row: in tokens.
        digit_share: of the answers' characters, spaces left out; None where no answer was read.
        source: of these figures, for people.
    """

    num_rows: int | None
    tokens_a_row: float
    longest_row: int
    digit_share: float | None
    source: str

    def num_tokens(self, config: RunConfig) -> float | None:
        """Tokens of the whole training."""
        if self.num_rows is None and config.train.max_steps is None:
            return None
        rows_a_step = config.train.micro_batch_size * config.train.gradient_accumulation_steps
        return num_steps(config.train, self.num_rows or 0) * rows_a_step * self.tokens_a_row


@dataclass(frozen=True)
class Rate:
    """10^12 floating-point operations a second that a device is made for, in 16 bits and in fp32; None: not known.

    Attributes:
        source: for people.
    """

    tflops: float | None
    float32_tflops: float | None
    source: str

    def of(self, setup: Setup) -> float | None:
        return self.float32_tflops if arithmetic_dtype(setup) is Dtype.float32 else self.tflops


def arithmetic_dtype(setup: Setup) -> Dtype:
    """Of training's matrix products."""
    bases = {
        TrainMethod.qlora: setup.quantization.compute_dtype,
        TrainMethod.lora: setup.model_dtype,
        TrainMethod.full: Dtype.float32,
    }
    return setup.train.mixed_precision or bases[setup.method]


def read_workload(config: RunConfig, processed: Path, counted_by: str | None = None) -> Workload:
    """From the processed data where they were made with these settings, else from the raw rows, else unknown.

    Args:
        counted_by: the model whose tokenizer made the processed data, where the plan is for another one.
    """
    longest = config.data.max_length
    if processed.is_dir():
        try:
            check_provenance(processed, config.data, config.model)
            split = load_split(processed, "train")
        except (ConfigError, DataError):
            why = f"{processed} is of other settings"
        else:
            answers = [text for i in range(min(len(split), NUM_SAMPLED)) for text in split.references(i)[:1]]
            mean, longest = float(split.lengths.mean()), int(split.lengths.max())
            source = str(processed)
            if counted_by is not None:
                source += f", counted by the tokenizer of {counted_by}: this model's own may find more or fewer"
            return Workload(len(split), mean, longest, _digit_share(answers), source)
    else:
        why = "data not prepared yet"
    if config.data.hub_id is not None:
        return Workload(
            None, longest, longest, None, f"unknown: rows of {config.data.hub_id} are not fetched for a plan"
        )
    try:
        num_rows, answers = _read_raw(config.data)
    except (ConfigError, DataError) as error:
        return Workload(None, longest, longest, None, f"unknown: {error}")
    return Workload(
        num_rows, longest, longest, _digit_share(answers), f"{why}: raw rows, each counted as data.max_length tokens"
    )


def _read_raw(data: DataConfig) -> tuple[int, list[str]]:
    """Training rows of a local file, and some of their answers."""
    path = Path(data.path)
    file = str(data.files.train)
    if file.removesuffix(".gz").endswith(".txt"):
        raise ConfigError("a plain text has no rows before it is cut; run `python -m stages.prepare` first.")
    rows = [row for row in read_rows(path / file if path.is_dir() else path, file) if isinstance(row, RawRow)]
    held_out = sum(getattr(data, f"{name}_share") for name in ("validation", "test") if not getattr(data.files, name))
    num_rows = min(round(len(rows) * (1 - held_out)), data.max_rows or len(rows))
    parsed = (parse_row(row, data) for row in islice(rows, NUM_SAMPLED))
    return num_rows, [row.references[0] for row in parsed if isinstance(row, Conversation) and row.references]


def _digit_share(answers: list[str]) -> float | None:
    text = "".join("".join(answers).split())
    return sum(character.isdigit() for character in text) / len(text) if text else None


def measured_rate(architecture: Architecture, device: torch.device) -> Rate:
    """From matmuls on this device at the shape of the model's largest linear layer."""
    layer = max(architecture.linear, key=lambda layer: layer.num_weights)
    num_tokens = max(64, min(4096, int(MEASURED_FLOPS / (2 * layer.num_weights))))
    flops = 2 * num_tokens * layer.num_weights
    tflops = {}
    for dtype in (torch.bfloat16, torch.float32):
        rows = torch.randn(num_tokens, layer.in_features, device=device, dtype=dtype)
        weight = torch.randn(layer.in_features, layer.out_features, device=device, dtype=dtype)
        tflops[dtype] = flops / min(_seconds(rows, weight) for _ in range(5)) / 1e12
    shapes = f"matmuls of [{num_tokens}, {layer.in_features}] and [{layer.in_features}, {layer.out_features}]"
    return Rate(tflops[torch.bfloat16], tflops[torch.float32], f"measured here by {shapes}")


def _seconds(rows: torch.Tensor, weight: torch.Tensor) -> float:
    started = time.perf_counter()
    product = rows @ weight
    product[0, 0].item()  # waits for the device
    return time.perf_counter() - started


def seconds_per_million_tokens(
    architecture: Architecture, setup: Setup, rate: Rate, tokens_a_row: float
) -> float | None:
    """Of all processes together; validation, loading and the time between forwards are not in it.

    None: no rate for its dtype.
    """
    tflops = rate.of(setup)
    if tflops is None:
        return None
    flops = flops_per_token(architecture, setup)
    slower = DEQUANTISATION / (setup.micro_batch_size * tokens_a_row) if setup.keeps_quantized else 0.0
    return 1e6 * flops * (1 + slower) / (UTILISATION * tflops * 1e12 * setup.num_processes)
