"""What a training takes and costs, before anything is downloaded: `python -m pipeline.plan`.

    python -m pipeline.plan                                     the configured training, on this machine
    python -m pipeline.plan model=llama3_8b --gpu 24GB          another model, on a card of that size
    python -m pipeline.plan --model qwen3_8b --gpu rtx4090 lora.r=64 data.max_length=2048

Works from the model's config.json alone: no weights, no GPU. Overrides are those of `python -m stages.train`.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.architecture import Architecture, read_architecture
from pipeline.config import clean_errors, compose, quiet_logs, to_settings
from pipeline.device_memory import free_bytes
from pipeline.errors import ConfigError
from pipeline.fit_check import device_type
from pipeline.memory import disk_bytes, usable_bytes
from pipeline.plan_advice import Advice, advise
from pipeline.plan_cards import CARDS, Card, parse_card
from pipeline.plan_columns import Column, Grid, configured_name, make_tables
from pipeline.plan_models import find_model
from pipeline.plan_text import plan_text
from pipeline.plan_time import UTILISATION, Rate, Workload, measured_rate, read_workload, seconds_per_million_tokens
from pipeline.schema import RunConfig, TrainMethod
from pipeline.workspace import PROCESSED


@dataclass(frozen=True)
class Plan:
    """Everything that the plan says; memory in bytes of one process's device.

    Attributes:
        device: `cpu` or `cuda`; `device_source` says which one that is, `has_bfloat16` whether it computes in it.
        capacity_bytes: free beside driver and CUDA context; `usable_bytes` of them for tensors.
        micro_batch_size: of one process.
        configured: the column that the settings ask for.
        num_tokens: of the whole training; None where the rows are not known.
        rate: None where no FLOP rate is known; then `seconds_by_card` has the times of known cards of that size.
        utilisation: of the rate, that training is expected to reach.
    """

    model: str
    model_source: str
    num_parameters: int
    device: str
    device_source: str
    capacity_bytes: int
    usable_bytes: int
    micro_batch_size: int
    length: int
    settings: str
    configured: str
    columns: dict[str, Column]
    grid: Grid
    workload: Workload
    num_tokens: float | None
    rate: Rate | None
    seconds_by_card: dict[str, float]
    utilisation: float
    disk_bytes: dict[str, int]
    advice: Advice


def make_plan(
    overrides: Sequence[str],
    gpu: str | None = None,
    model: str | None = None,
    tflops: float | None = None,
    measure: bool = False,
) -> Plan:
    """The plan of the settings that `overrides` make.

    Args:
        gpu: a size or a card's name; None: the device that a training here would take.
        model: see `find_model`. tflops: of the device. measure: time a matmul here.

    Raises:
        ConfigError: settings, card or model that cannot be; `measure` for another device than the one here.
        ModelError: see `find_model`, `read_architecture`.
    """
    composed = compose(overrides, "run")
    configured_model = composed.model.hub_id or composed.model.path
    found = find_model(composed, model)
    config = to_settings(composed)
    architecture = read_architecture(found.config, found.name, config.model.trust_remote_code)
    card = parse_card(gpu) if gpu else None
    if card and measure:
        raise ConfigError("--measure: times this machine, and --gpu names another; give one of them, or --tflops.")
    if tflops is not None and (measure or tflops <= 0):
        raise ConfigError(f"--tflops: {tflops:g}; give a number over 0, and no --measure beside it.")
    device = "cuda" if card else device_type(config.runtime)
    capacity = card.free_bytes if card else free_bytes(device)
    workload = read_workload(
        config, Path(config.runtime.inputs_dir) / PROCESSED, None if model is None else configured_model
    )
    rate = _rate(architecture, card, tflops, device if measure else None)
    columns, grid = make_tables(architecture, config, device, capacity, workload, rate)
    configured, tokens = configured_name(config), workload.num_tokens(config)
    return Plan(
        model=found.name,
        model_source=found.source,
        num_parameters=architecture.num_parameters,
        device=device,
        device_source=_device_source(card, device),
        capacity_bytes=capacity,
        usable_bytes=usable_bytes(capacity, device),
        micro_batch_size=columns[configured].setup.micro_batch_size,
        length=config.data.max_length,
        settings=_settings(config),
        configured=configured,
        columns=columns,
        grid=grid,
        workload=workload,
        num_tokens=tokens,
        rate=rate,
        seconds_by_card=_seconds_by_card(architecture, columns[configured], card, workload, tokens),
        utilisation=UTILISATION,
        disk_bytes=disk_bytes(architecture, config),
        advice=advise(architecture, config, columns, workload, capacity, card is None or card.has_bfloat16),
    )


def _rate(architecture: Architecture, card: Card | None, tflops: float | None, measured_on: str | None) -> Rate | None:
    if measured_on is not None:
        return measured_rate(architecture, torch.device(measured_on))
    if tflops is not None:
        return Rate(tflops, tflops, "given by --tflops")
    return _card_rate(card) if card and card.tflops is not None else None


def _card_rate(card: Card) -> Rate:
    return Rate(card.tflops, card.float32_tflops, f"{card.name}'s data sheet")


def _seconds_by_card(
    architecture: Architecture, column: Column, asked: Card | None, workload: Workload, tokens: float | None
) -> dict[str, float]:
    """Of the configured method on each known card of the asked size."""
    if asked is None or asked.tflops is not None or tokens is None:
        return {}
    found = {}
    for card in CARDS:
        rate = _card_rate(card)
        seconds = seconds_per_million_tokens(architecture, column.setup, rate, workload.tokens_a_row)
        if abs(card.gigabytes - asked.gigabytes) < 1 and seconds is not None:
            found[card.name] = seconds * tokens / 1e6
    return found


def _device_source(card: Card | None, device: str) -> str:
    if card is not None:
        what = f"a card of {card.name}" if card.tflops is None else f"{card.name} (data sheet)"
        return f"{what}, beside the CUDA context"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, free now"
    return "this machine's CPU (torch finds no GPU; --gpu 24GB plans for a card), memory free now"


def _settings(config: RunConfig) -> str:
    train, lora, runtime = config.train, config.lora, config.runtime
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    adapter = "" if train.method is TrainMethod.full else f", r {lora.r} on {targets}"
    shared = f", {runtime.num_processes} processes ({runtime.engine})" if runtime.num_processes > 1 else ""
    return (
        f"{train.method}{adapter}, {train.micro_batch_size} rows a micro-batch x {train.gradient_accumulation_steps} "
        f"a step, up to {config.data.max_length:,} tokens a row, {train.optimizer}{shared} (* below)"
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """Every figure, for programs; sizes in bytes, times in seconds."""
    values = dataclasses.asdict(plan)
    for name, column in plan.columns.items():
        setup = values["columns"][name].pop("setup")
        del setup["train"], setup["lora"], setup["quantization"]
        values["columns"][name] |= setup
        for variant in ("kept", "recomputed"):
            values["columns"][name][variant]["memory"]["total"] = getattr(column, variant).memory.total
    return values


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="settings, such as lora.r=16 train=lora model=llama3_8b")
    parser.add_argument("--gpu", help="a size (24GB, 24GiB) or a card (rtx4090, l4, a100-80gb, h100, ...)")
    parser.add_argument("--model", help="a named size, a folder with config.json, or a Hub id (owner/name[@REVISION])")
    parser.add_argument("--tflops", type=float, help="dense TFLOPS of the device, for the time")
    parser.add_argument("--measure", action="store_true", help="time a matmul on this machine, for the time")
    parser.add_argument("--json", action="store_true", help="every figure as JSON")
    args = parser.parse_intermixed_args()
    quiet_logs()
    with clean_errors("plan"):
        plan = make_plan(args.overrides, args.gpu, args.model, args.tflops, args.measure)
        print(json.dumps(plan_json(plan), indent=2) if args.json else plan_text(plan))


if __name__ == "__main__":
    main()
