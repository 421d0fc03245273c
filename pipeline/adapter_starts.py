"""Warm starts of LoRA (`lora.start`): A and B before the first step, other than A random and B = 0.

PiSSA, OLoRA and CorDA move a part of each weight into the adapter, and the base keeps the rest:
W = (W - s B0 A0) + s B0 A0. What is saved is plain LoRA on the base as it was, of twice the rank: s (B A - B0 A0). EVA
sets A and leaves B at 0. LoftQ adds what quantisation lost. `pipeline.start_factors` has the formulas and the papers.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.batching import Batch
from pipeline.dataset import Split
from pipeline.errors import TrainingError
from pipeline.files import write_text
from pipeline.guards import parameter_checksums
from pipeline.loftq import correct_quantization, summed_logits
from pipeline.method_hooks import NO_HOOKS, MethodHooks
from pipeline.schema import LoraStart, RunConfig
from pipeline.start_factors import (
    Layers,
    corda,
    eva,
    factors_of,
    lora_layers,
    move_into_adapter,
    olora,
    pissa,
    product_OI,
    set_factors,
    set_weight,
    size,
    weight_OI,
)
from pipeline.start_inputs import input_moments
from pipeline.training import is_out_of_memory

logger = logging.getLogger(__name__)


def start_adapter(model: torch.nn.Module, config: RunConfig, split: Split, pad_token_id: int) -> MethodHooks:
    """Gives a fresh LoRA its start, and the base what is left of it.

    Args:
        model: with the adapter, in eval mode.
        split: training rows, which EVA and CorDA read.

    Returns:
        Its part in the training.

    Raises:
        ModelError, TrainingError: see `pipeline.start_inputs`, `pipeline.loftq`; or memory runs out.
    """
    try:
        return _start_adapter(model, config, split, pad_token_id)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        device, first = next(model.parameters()).device, str(error).strip().splitlines()[0]
        raise TrainingError(
            f"{device}: out of memory before the first step, in lora.start {config.lora.start} ({first}). It holds "
            "matrices of the size of a layer's weights beside the base; eva and corda also read lora.start_rows rows, "
            "train.micro_batch_size at a time: lower these, or set lora.start=zero."
        ) from None


def _start_adapter(model: torch.nn.Module, config: RunConfig, split: Split, pad_token_id: int) -> MethodHooks:
    layers, start = lora_layers(model), config.lora.start
    if start is LoraStart.loftq:
        correct_quantization(layers, config.model)
        return NO_HOOKS
    if start is LoraStart.eva:
        for name, covariance_II in input_moments(model, layers, config, split, pad_token_id):
            A_RI = eva(covariance_II, size(layers[name])[0])
            set_factors(layers[name], A_RI, torch.zeros_like(factors_of(layers[name])[1]))
        return NO_HOOKS
    if start is LoraStart.corda:
        for name, moment_II in input_moments(model, layers, config, split, pad_token_id):
            layer = layers[name]
            move_into_adapter(layer, *corda(weight_OI(layer), moment_II, *size(layer)))
    else:
        decompose = {LoraStart.pissa: pissa, LoraStart.olora: olora}[start]
        for layer in layers.values():
            move_into_adapter(layer, *decompose(weight_OI(layer), *size(layer)))
    starts_B = [factors_of(layer)[1] for layer in layers.values()]
    if num_random := sum(int((~b_OR.any(dim=0)).sum()) for b_OR in starts_B):
        num_ranks = sum(b_OR.shape[1] for b_OR in starts_B)
        logger.warning(
            "lora.start %s: %d of %d ranks start as LoRA's, at random: the weights hold nothing for them",
            start, num_random, num_ranks,
        )  # fmt: skip
    return ResidualHooks(layers)


def predicted_logits(model: torch.nn.Module, start: LoraStart, base_SV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The logits that the model has to give before its first step: the base's; with LoftQ the corrected weights'."""
    return summed_logits(model, lora_layers(model), batch) if start is LoraStart.loftq else base_SV


class ResidualHooks(MethodHooks):
    """Of a start that took a part of the base: remembers that part, and leaves it out of what is saved.

    A resumed training makes its start anew: on one machine that gives the same bits. Checkpoints hold the start too, so
    that a training that goes on elsewhere takes from the base what its weights go with.

    Attributes:
        base_checksums: by parameter, of what `load_state` changed in the frozen base.
    """

    def __init__(self, layers: Layers):
        self.layers = layers
        copies = {name: [factor.cpu().clone() for factor in factors_of(layer)] for name, layer in layers.items()}
        self.starts: dict[str, list[torch.Tensor]] = copies
        self.base_checksums: dict[str, int] = {}

    def state(self) -> dict[str, Any]:
        return {"starts": self.starts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Where the checkpoint's start is another one, the base gets back what was taken and gives that one's part."""
        moved = {}
        for name, layer in self.layers.items():
            now, then = self.starts[name], state["starts"][name]
            if all(torch.equal(*pair) for pair in zip(now, then, strict=True)):
                continue  # to the bit what it was
            left_OI = weight_OI(layer)
            now_OI, then_OI = (
                product_OI(layer, *(factor.to(left_OI.device) for factor in pair)) for pair in (now, then)
            )
            set_weight(layer, left_OI + now_OI - then_OI)
            moved[f"{name}.base_layer.weight"] = layer.get_base_layer().weight
            self.starts[name] = [factor.cpu().clone() for factor in then]
        if moved:
            self.base_checksums |= parameter_checksums(moved)
            logger.info("lora.start gives another start here than where the checkpoint was made, in %d of %d layers: "
                        "the base now lacks what it lacked there", len(moved), len(self.layers))  # fmt: skip

    def after_save(self, folder: Path) -> None:
        """From B A on what the base kept to (B A - B0 A0) on the base: twice the rank, the scaling as it was."""
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        for name, (A_RI, B_OR) in self.starts.items():
            a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            tensors[a] = torch.cat([tensors[a], A_RI.to(tensors[a])])
            tensors[b] = torch.cat([tensors[b], -B_OR.to(tensors[b])], dim=1)
        save_file(tensors, path, metadata={"format": "pt"})
        config_path = folder / "adapter_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        factor = 2**0.5 if config["use_rslora"] else 2  # rsLoRA's scaling is lora_alpha over the root of the rank
        config |= {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"]}
        config["rank_pattern"] = {key: 2 * rank for key, rank in config["rank_pattern"].items()}
        config["alpha_pattern"] = {key: factor * alpha for key, alpha in config["alpha_pattern"].items()}
        write_text(config_path, json.dumps(config, indent=2) + "\n")
