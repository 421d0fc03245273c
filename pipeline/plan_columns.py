"""What the plan says in figures: the four methods side by side, and the configured one by micro-batch and length."""

import functools
import math
from dataclasses import dataclass, replace

from pipeline.architecture import Architecture
from pipeline.memory import Memory, Setup, alternatives, plan_memory, trainable_parameters, usable_bytes
from pipeline.plan_time import Rate, Workload, seconds_per_million_tokens
from pipeline.schema import QuantizationMethod, RunConfig, TrainMethod

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
LENGTHS = (0.5, 1, 2, 4)  # of data.max_length
SHORTEST, MOST_ROWS, LONGEST = 8, 2**16, 2**20


@dataclass(frozen=True)
class Variant:
    """One method with activations kept, or recomputed in the backward pass.

    Attributes:
        fits: `memory.total` into the usable part of the device.
        largest_micro_batch, largest_length: that fit, each with the other as configured; interpolated.
        seconds: of the whole training; None where FLOP rate or tokens are not known.
    """

    memory: Memory
    fits: bool
    largest_micro_batch: int
    largest_length: int
    seconds_per_million_tokens: float | None
    seconds: float | None


@dataclass(frozen=True)
class Column:
    name: str
    setup: Setup
    trainable_parameters: int
    kept: Variant
    recomputed: Variant

    @property
    def configured(self) -> Variant:
        return self.recomputed if self.setup.gradient_checkpointing else self.kept


@dataclass(frozen=True)
class Grid:
    """Totals in bytes, a row a micro-batch, a column a length; interpolated by micro-batch."""

    micro_batches: tuple[int, ...]
    lengths: tuple[int, ...]
    totals: tuple[tuple[int, ...], ...]


class Totals:
    """Plans of one setup by micro-batch and length. Each takes a good part of a second, so few are made.

    At one length the memory of a step is a straight line in the rows of a micro-batch (they lie end to end), that of
    loading the same for all; at one micro-batch both grow about evenly with the length (docs/memory.md).
    """

    def __init__(self, architecture: Architecture, setup: Setup):
        self.size, self.length = setup.micro_batch_size, min(setup.length, architecture.max_context or LONGEST)
        self.longest = architecture.max_context or LONGEST

        @functools.cache
        def plan(size: int, length: int) -> Memory:
            return plan_memory(architecture, replace(setup, micro_batch_size=size, length=length))

        self.plan = plan

    @property
    def configured(self) -> Memory:
        return self.plan(self.size, self.length)

    def of_step(self, length: int) -> tuple[int, float, int]:
        """Bytes of a step with one row of this length, what one row more adds, and the bytes while loading."""
        other = self.size if self.size > 1 else 8
        one, many = self.plan(1, length), self.plan(other, length)
        a_row = max(0.0, (_step(many) - _step(one)) / (other - 1))
        return _step(one), a_row, max(one.loading, many.loading)

    def largest_micro_batch(self, usable: int) -> int:
        one, a_row, loading = self.of_step(self.length)
        if max(one, loading) > usable:
            return 0
        return min(MOST_ROWS, 1 + int((usable - one) / a_row) if a_row else MOST_ROWS)

    def largest_length(self, usable: int) -> int:
        """Along the line through two lengths, then through the nearer of them and where that ended."""
        short, length = max(SHORTEST, self.length // 4), self.length
        known = {each: self.plan(self.size, each).total for each in (short, length)}
        for _ in range(2):
            left, right = sorted(sorted(known, key=lambda each: abs(known[each] - usable))[:2])
            a_token = (known[right] - known[left]) / max(1, right - left)
            end = left + (usable - known[left]) / a_token if a_token > 0 else self.longest
            guess = int(min(end, self.longest))
            if guess < SHORTEST:
                return 0
            if len(known) == 2 and guess not in known:
                known[guess] = self.plan(self.size, guess).total
        return guess


def _step(memory: Memory) -> int:
    return memory.states + memory.activations + memory.logits + memory.workspace


def rows_a_process(config: RunConfig) -> int:
    """Of a micro-batch, as `training.micro_batch_rows` cuts a step: fewer where each process would not get one."""
    rows_a_step = config.train.micro_batch_size * config.train.gradient_accumulation_steps
    return min(config.train.micro_batch_size, math.ceil(rows_a_step / config.runtime.num_processes))


def configured_name(config: RunConfig) -> str:
    """Which of the plan's columns is the configured method."""
    if config.train.method is TrainMethod.qlora:
        return "lora int8" if config.quantization.method is QuantizationMethod.int8 else "qlora"
    return str(config.train.method)


def make_tables(
    architecture: Architecture,
    config: RunConfig,
    device: str,
    capacity_bytes: int,
    workload: Workload,
    rate: Rate | None,
) -> tuple[dict[str, Column], Grid]:
    """The plan's columns by name, and the configured method by micro-batch and length.

    Raises:
        ConfigError, ModelError: see `plan_memory`.
    """
    tokens, usable = workload.num_tokens(config), usable_bytes(capacity_bytes, device)

    def variant(setup: Setup, totals: Totals) -> Variant:
        seconds = seconds_per_million_tokens(architecture, setup, rate, workload.tokens_a_row) if rate else None
        return Variant(
            totals.configured,
            totals.configured.total <= usable,
            totals.largest_micro_batch(usable),
            totals.largest_length(usable),
            seconds,
            seconds * tokens / 1e6 if seconds is not None and tokens is not None else None,
        )

    columns, grid = {}, None
    rows = rows_a_process(config)
    for name, configured in alternatives(config, device, config.data.max_length).items():
        setup = replace(configured, micro_batch_size=rows)
        both = [replace(setup, gradient_checkpointing=recomputes) for recomputes in (False, True)]
        totals = [Totals(architecture, each) for each in both]
        variants = [variant(*pair) for pair in zip(both, totals, strict=True)]
        columns[name] = Column(name, setup, trainable_parameters(architecture, setup), *variants)
        if name == configured_name(config):
            grid = _grid(totals[setup.gradient_checkpointing])
    assert grid is not None
    return columns, grid


def _grid(totals: Totals) -> Grid:
    """Around the configured length."""
    lengths = sorted({min(totals.longest, max(SHORTEST, int(totals.length * factor))) for factor in LENGTHS})
    lines = [totals.of_step(length) for length in lengths]
    rows = [
        tuple(max(round(one + (size - 1) * a_row), loading) for one, a_row, loading in lines) for size in MICRO_BATCHES
    ]
    return Grid(MICRO_BATCHES, tuple(lengths), tuple(rows))
