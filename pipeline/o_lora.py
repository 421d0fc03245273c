"""O-LoRA (arXiv 2310.14152): a new adapter beside frozen earlier ones, kept out of their subspaces by a penalty.

    loss + weight sum over layers of |A_earlier A_new^T|^2        (section 3; here A_RI has its basis in rows)

The sum of all adapters answers. It is plain LoRA again, of the sum of the ranks: A below each other, scaling B side by
side. The authors' code sums absolute values in the place of squares.

Shape suffixes: R rank of the new adapter, E of the earlier ones together, I in features, O out features.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pipeline.bnb  # noqa: F401  # before peft, which imports bitsandbytes with it

# isort: split
import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from pipeline.errors import ModelError
from pipeline.files import read_json, write_text
from pipeline.lora import MIXING, load_adapter
from pipeline.method_hooks import MethodHooks

EARLIER = "earlier"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PLAIN_WITHOUT = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")


class OverlapPenalty(MethodHooks):
    """The penalty on a model that `attach_earlier` returned, which no step of training changes but for A_new."""

    def __init__(self, model: peft.PeftModel, weight: float):
        self._pairs, self._weight = list(_pairs(model)), weight

    def penalty(self) -> torch.Tensor | None:
        if not self._weight:
            return None
        products = [(earlier_EI.to(new_RI.dtype) @ new_RI.T).square().sum() for earlier_EI, new_RI in self._pairs]
        return self._weight * torch.stack(products).sum()


def attach_earlier(model: peft.PeftModel, folder: Path) -> None:
    """Puts the adapter of `folder` beside the model's own, frozen; both answer, and the own alone trains.

    Raises:
        ModelError: it does not fit the model.
    """
    was_training = _trainable(model)
    load_adapter(model, folder, EARLIER)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and EARLIER in layer.lora_dropout:
            layer.lora_dropout[EARLIER] = torch.nn.Identity()  # it is a part of the model that is trained on
    _activate(model, ["default", EARLIER], was_training)


def overlap(model: peft.PeftModel) -> float:
    """How much of the new subspaces lies in the earlier ones, 0 to 1, mean over layers.

    Of a layer, the mean squared cosine of the principal angles of the row spaces of A_new and A_earlier. Two random
    subspaces have E / I.
    """
    shares = []
    for earlier_EI, new_RI in _pairs(model):
        bases = [torch.linalg.qr(a.detach().double().T).Q for a in (earlier_EI, new_RI)]
        shares.append(float((bases[0].T @ bases[1]).square().sum()) / new_RI.shape[0])
    return sum(shares) / len(shares)


def _pairs(model: peft.PeftModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A_EI and A_RI of each adapted layer."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            of_adapters: Any = layer.lora_A
            yield of_adapters[EARLIER].weight, of_adapters["default"].weight


def detach_earlier(model: peft.PeftModel) -> None:
    """Leaves the model's own adapter alone."""
    was_training = _trainable(model)
    model.delete_adapter(EARLIER)
    _activate(model, ["default"], was_training)


def _trainable(model: peft.PeftModel) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def _activate(model: peft.PeftModel, adapters: list[str], trainable: set[str]) -> None:
    """Has these adapters answer; peft makes them trainable with it, and that is put back."""
    tuner: Any = model.base_model
    tuner.set_adapter(adapters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


def sum_adapters(folders: Sequence[Path], target: Path, weights: Sequence[float] | None = None) -> None:
    """Writes the (weighted) sum of plain LoRA adapters on one base as one such adapter, in float32.

    Raises:
        ModelError: one is no plain LoRA, or they are on different layers.
    """
    configs = [check_plain(folder) for folder in folders]
    states = [load_file(folder / WEIGHTS) for folder in folders]
    for folder, state in zip(folders, states, strict=True):
        if state.keys() != states[0].keys():
            raise ModelError(f"{folder}: is on other layers than {folders[0]}. Sum adapters of one target_modules.")
    summed = {}
    for name in states[0]:
        if "lora_A" in name:
            summed[name] = torch.cat([state[name].float() for state in states])
        else:
            factors = [
                state[name].float() * (weight * scaling(config))
                for state, config, weight in zip(states, configs, weights or [1.0] * len(folders), strict=True)
            ]
            summed[name] = torch.cat(factors, dim=1)
    write_plain(summed, configs[0], target)


def write_plain(state: Mapping[str, torch.Tensor], like: Mapping[str, Any], target: Path) -> None:
    """Writes a LoRA adapter of scaling 1 in PEFT format; its other settings are those of `like`."""
    rank = next(len(tensor) for name, tensor in state.items() if "lora_A" in name)
    config = {**like, "r": rank, "lora_alpha": rank, "use_rslora": False, "lora_dropout": 0.0}
    target.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / WEIGHTS, {"format": "pt"})
    write_text(target / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_plain(folder: Path) -> dict[str, Any]:
    """The adapter's configuration. Raises: ModelError: it is not A and B of one rank alone."""
    config: dict[str, Any] = read_json(folder / CONFIG)
    others = [key for key in PLAIN_WITHOUT if config.get(key)] + [MIXING] * (folder / MIXING).exists()
    if config["peft_type"] != "LORA" or config.get("bias", "none") != "none" or others:
        named = ", ".join(others) or config["peft_type"]
        raise ModelError(f"{folder}: no plain LoRA of one rank ({named}), which alone can be summed.")
    return config


def scaling(config: Mapping[str, Any]) -> float:
    """lora_alpha / r, with use_rslora lora_alpha / sqrt(r)."""
    r = config["r"]
    return float(config["lora_alpha"]) / (r**0.5 if config["use_rslora"] else r)
