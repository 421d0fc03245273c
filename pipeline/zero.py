"""DeepSpeed's ZeRO-2 and ZeRO-3 (arXiv 1910.02054): what is its own; imported where `runtime.engine` is deepspeed.

ZeRO-2 cuts gradients and optimizer states among the processes, ZeRO-3 the weights too. The states lie in flat tensors
of many weights; a checkpoint has them weight by weight, as torch's AdamW does, so that any engine goes on from it.
"""

import logging
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from pipeline.packing import inner_model
from pipeline.ranks import Ranks, move_rest
from pipeline.schema import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def plugin(settings: TrainConfig, stage: int) -> DeepSpeedPlugin:
    """What accelerate is told. DeepSpeed counts no micro-batches: each step says which is its last."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": False},  # that would round the weights; torch's autocast does not
    }
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small weights in pieces too
    if settings.mixed_precision is not None:  # gradients meet in the weights' dtype: no module's in a lower one
        dtype = settings.mixed_precision.value
        config["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)  # the base is loaded already


def cut(model: torch.nn.Module, accelerator: Accelerator, device: torch.device) -> None:
    """ZeRO-3: leaves each process its piece of every weight; a decoder layer's are put together while it computes.

    Each weight goes to the device as it is cut, so that the whole model need not fit there.
    """
    names = set(inner_model(model)._no_split_modules or [])
    layers = {type(module) for module in model.modules() if type(module).__name__ in names}
    if layers:  # the adapter's layers are computed without calling each of their modules (`pipeline.fused_lora`)
        deepspeed.utils.set_z3_leaf_modules(model, list(layers))
    # the first layer's gradients are taken when that of its input is there: a frozen embedding's output asks for none
    inner_model(model).enable_input_require_grads()
    deepspeed.zero.Init(module=model, config_dict_or_path=accelerator.state.deepspeed_plugin.deepspeed_config)
    move_rest(model, device)


def load_weight(parameter: Any, value: torch.Tensor, ranks: Ranks) -> None:
    """Puts a whole weight, the same in all processes, where DeepSpeed computes with it and where it updates it."""
    value = value.to(ranks.device)
    if ranks.zero_stage == 2:
        parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value)
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)
    safe_set_local_fp32_param(parameter, _piece(parameter, value, ranks))


def optimizer_state(engine: Any, parameters: list[torch.nn.Parameter]) -> dict[str, Any]:
    """The state dict that torch's AdamW would have in one process, on the CPU; all processes have to ask."""
    optimizer = engine.basic_optimizer
    states: dict[int, dict[str, torch.Tensor]] = {}
    if optimizer.state:
        step = next(iter(optimizer.state.values()))["step"].cpu()
        for number, parameter in enumerate(parameters):
            moments = {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in MOMENTS}
            states[number] = {"step": step.clone(), **moments}  # one tensor would count every weight
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    return {"state": states, "param_groups": [{**group, "params": list(range(len(parameters)))}]}


def load_optimizer_state(
    engine: Any, parameters: list[torch.nn.Parameter], state: dict[str, Any], ranks: Ranks
) -> None:
    """Puts back what `optimizer_state`, or torch's AdamW in one process, gave."""
    optimizer, zero = engine.basic_optimizer, engine.optimizer
    (group,) = state["param_groups"]
    optimizer.param_groups[0].update({key: value for key, value in group.items() if key != "params"})
    if not state["state"]:
        return
    is_two = ranks.zero_stage == 2
    for flat in zero.single_partition_of_fp32_groups if is_two else zero.fp32_partitioned_groups_flat:
        moments = {name: torch.zeros_like(flat) for name in MOMENTS}
        optimizer.state[flat] = {"step": state["state"][0]["step"].to(flat.device).clone(), **moments}
    if is_two:
        zero._lazy_init_hp_params_optimizer_state()  # as its first step does: ties weights to their parts of flat ones
    for number, parameter in enumerate(parameters):
        for name in MOMENTS:
            value = state["state"][number][name].to(ranks.device)
            if is_two:
                safe_set_full_optimizer_state(parameter, value, name)
            else:
                safe_set_local_optimizer_state(parameter, _piece(parameter, value, ranks), name)


def _piece(parameter: Any, value: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """This process's piece of a whole tensor; the last ones are filled up, which DeepSpeed's own setters do not do."""
    size = parameter.ds_tensor.numel()
    filled = torch.nn.functional.pad(value.flatten(), (0, size * ranks.count - value.numel()))
    return filled[size * ranks.index : size * (ranks.index + 1)]
