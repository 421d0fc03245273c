"""AdaLoRA (arXiv 2303.10512): W + P E Q with a diagonal E, whose least important entries are cut while training.

peft has the layers and the allocation of ranks. Here is what drives it: the schedule from the length of the training,
the penalty that keeps P and Q orthogonal (peft adds it only to a loss that the model itself computes), and the
allocator's memory in checkpoints. peft scales P E Q by lora_alpha over the initial rank, all through the training.
"""

from typing import Any

import pipeline.bnb  # noqa: F401  # before peft, which imports bitsandbytes with it

# isort: split
import peft
import torch

from pipeline.errors import ConfigError
from pipeline.method_hooks import MethodHooks
from pipeline.schema import LoraConfig
from pipeline.start_rules import initial_rank

NAME = "default"


def adalora_config(lora: LoraConfig, common: dict[str, Any], num_steps: int) -> peft.PeftConfig:
    """peft's configuration, its schedule in steps of this training (whole ones, rounded down)."""
    settings = lora.adalora
    return peft.AdaLoraConfig(
        init_r=initial_rank(lora),
        target_r=lora.r,
        tinit=int(settings.warmup_ratio * num_steps),
        tfinal=int(settings.final_ratio * num_steps),
        deltaT=settings.interval,
        beta1=settings.beta1,
        beta2=settings.beta2,
        orth_reg_weight=settings.orthogonality,
        total_step=num_steps,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # peft divides it by the rank: a float is as good
        lora_dropout=lora.lora_dropout,
        bias=lora.bias.value,
        **common,
    )


class AdaLoraHooks(MethodHooks):
    """Cuts ranks after each update, by peft's allocator.

    Args:
        model: a PeftModel with a fresh AdaLoRA adapter.

    Raises:
        ConfigError: the initial rank is over a layer's width.
    """

    def __init__(self, model: Any):
        self.tuner, self.config = model.base_model, model.peft_config[NAME]
        self.parameters = {n: p for n, p in self.tuner.model.named_parameters() if "lora_" in n and p.requires_grad}
        for name, parameter in self.parameters.items():
            width = parameter.shape[1] if "lora_A" in name else parameter.shape[0]
            if "lora_E" not in name and width < self.config.init_r:
                raise ConfigError(
                    f"lora.adalora.init_ratio: {self.config.init_r} ranks at first are over the width of "
                    f"{name.partition('.lora_')[0]}, {width}; lower it, or lora.r"
                )

    def penalty(self) -> torch.Tensor | None:
        """The mean over all P and Q of |P^T P - I| and |Q Q^T - I| (Frobenius), times `lora.adalora.orthogonality`.

        This is the authors' code, and peft's, for which the usual weights are made; equation 4 of the paper has the
        squared norms, summed.
        """
        if not self.config.orth_reg_weight:
            return None
        norms = []
        with torch.autocast(self.tuner.model.device.type, enabled=False):
            for name, parameter in self.parameters.items():
                if "lora_E" not in name:
                    vectors = parameter.float() if "lora_A" in name else parameter.float().T
                    norms.append(torch.linalg.norm(vectors @ vectors.T - torch.eye(len(vectors)).to(vectors)))
        return self.config.orth_reg_weight * torch.stack(norms).mean()

    def after_update(self, step: int) -> None:
        for parameter in self.parameters.values():
            if parameter.grad is None:  # no supervised token in this step, or no update made of it
                parameter.grad = torch.zeros_like(parameter)
        self.tuner.update_and_allocate(step)

    def may_be_kept(self, step: int) -> bool:
        """From the step that cuts to the final budget on."""
        return bool(step >= self.config.total_step - self.config.tfinal)

    def state(self) -> dict[str, Any]:
        """The ranks kept so far, by layer, and the running importance and uncertainty of each weight."""
        allocator = self.tuner.rankallocator
        averages = {"importance": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc}
        kept = {name: {n: tensor.cpu() for n, tensor in each.items()} for name, each in averages.items()}
        return {"rank_pattern": self.config.rank_pattern, **kept}

    def load_state(self, state: dict[str, Any]) -> None:
        allocator = self.tuner.rankallocator
        self.config.rank_pattern = state["rank_pattern"]
        for name, each in (("importance", allocator.exp_avg_ipt), ("uncertainty", allocator.exp_avg_unc)):
            each.clear()
            each.update({n: tensor.to(self.parameters[n].device) for n, tensor in state[name].items()})
        allocator.ipt = dict(allocator.exp_avg_ipt)  # read only for which weights it has
