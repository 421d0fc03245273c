"""Which of LoRA's relatives, optimizers, patterns and new tokens go together: `pipeline.validation` asks."""

import re

from pipeline.schema import AdapterMethod, Engine, LoraConfig, Optimizer, RunConfig, TrainMethod


def lora_problems(config: RunConfig) -> list[str]:
    """One line for each problem of LoRA+, LoRA-FA, `lora.*_pattern`, `lora.modules_to_save` and `model.new_tokens`."""
    found = [*_pattern_problems(config.lora), *_lora_plus_problems(config), *_lora_fa_problems(config)]
    return [*found, *_module_problems(config), *_token_problems(config)]


def _pattern_problems(lora: LoraConfig) -> list[str]:
    found = []
    for name, pattern, minimum in (("rank_pattern", lora.rank_pattern, 1), ("alpha_pattern", lora.alpha_pattern, 0)):
        for key, value in pattern.items():
            if value < minimum or value == 0:
                found.append(f"lora.{name}: {key!r} is {value:g}; it must be {'1 or more' if minimum else 'over 0'}")
            try:
                re.compile(rf"(.*\.)?({key})$")  # as peft looks for it
            except re.error as error:
                found.append(f"lora.{name}: {key!r} is no regular expression ({error}); a layer's name is one")
            if not key:
                found.append(f"lora.{name}: a key is empty; give the name of a layer, such as q_proj or layers.0.mlp.*")
    return found


def _lora_plus_problems(config: RunConfig) -> list[str]:
    train, found = config.train, []
    if train.lora_plus_ratio is None:
        return []
    if train.lora_plus_ratio < 1:
        found.append(f"train.lora_plus_ratio: {train.lora_plus_ratio:g} must be 1 or more: LoRA+ has B learn faster")
    if train.method is TrainMethod.full or config.lora.method is not AdapterMethod.lora:
        what = "train.method full" if train.method is TrainMethod.full else f"lora.method {config.lora.method}"
        found.append(f"train.lora_plus_ratio: LoRA+ is for LoRA's A and B, which {what} does not train; set null")
    if train.optimizer is Optimizer.lora_fa:
        found.append("train.lora_plus_ratio: with train.optimizer lora_fa, where A does not move at all; set null")
    if _uses(config, Engine.deepspeed):
        found.append(
            "train.lora_plus_ratio: with runtime.engine deepspeed, whose flat tensors have one learning rate; set "
            "null, or runtime=fsdp"
        )
    return found


def _lora_fa_problems(config: RunConfig) -> list[str]:
    train, lora = config.train, config.lora
    if train.optimizer is not Optimizer.lora_fa:
        return []
    if train.method is TrainMethod.full or lora.method is not AdapterMethod.lora:
        what = "train.method full" if train.method is TrainMethod.full else f"lora.method {lora.method}"
        return [f"train.optimizer: lora_fa freezes LoRA's A, which {what} does not train; set adamw"]
    if lora.use_dora:
        return [
            "train.optimizer: lora_fa with lora.use_dora, whose norms change what a step of B does to the weights: the "
            "correction would be wrong; set lora.use_dora=false, or adamw"
        ]
    return []


def _module_problems(config: RunConfig) -> list[str]:
    names, found = config.lora.modules_to_save, []
    if not all(names) or len(set(names)) < len(names):
        found.append(f"lora.modules_to_save: {names!r} has an empty name, or one twice")
    if names and _cuts(config):
        found.append(
            f"lora.modules_to_save: with runtime.engine {config.runtime.engine}, which would cut the module's two "
            "copies among the processes; set runtime=ddp, or leave it out"
        )
    return found


def _token_problems(config: RunConfig) -> list[str]:
    tokens, lora, found = config.model.new_tokens, config.lora, []
    if not tokens:
        return []
    if len(set(tokens)) < len(tokens):
        found.append(f"model.new_tokens: {tokens!r} names a token twice")
    found += [
        f"model.new_tokens: {token!r} begins or ends with white space, or is nothing else; give the bare token"
        for token in tokens
        if token != token.strip() or not token
    ]
    if config.train.method is TrainMethod.full:
        return found
    if lora.method is not AdapterMethod.lora:
        found.append(
            f"model.new_tokens: with lora.method {lora.method}: peft trains rows of embeddings beside lora alone; set "
            "lora.method=lora, or train.method=full"
        )
    if _cuts(config):
        found.append(
            f"model.new_tokens: with runtime.engine {config.runtime.engine}: peft puts trained rows into whole "
            "embeddings, of which each process would hold pieces; set runtime=ddp"
        )
    return found


def _uses(config: RunConfig, engine: Engine) -> bool:
    return config.runtime.num_processes > 1 and config.runtime.engine is engine


def _cuts(config: RunConfig) -> bool:
    return _uses(config, Engine.fsdp) or _uses(config, Engine.deepspeed)
