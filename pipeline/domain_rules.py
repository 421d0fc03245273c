"""What of `data.domains` and `domains.*` cannot be, in the lines of `pipeline.validation.problems`."""

from pipeline.schema import (
    AdapterMethod,
    Bias,
    DomainMethod,
    Dtype,
    LoraStart,
    Optimizer,
    QuantizationMethod,
    RunConfig,
    TrainMethod,
)

CHAINED = (DomainMethod.sequential, DomainMethod.replay)


def domain_problems(config: RunConfig) -> list[str]:
    """One line a problem; ranges always, what does not go together where there are domains."""
    domains = config.domains
    found = []
    if not 0 < domains.replay_share <= 1:
        found.append(f"domains.replay_share: {domains.replay_share} must be over 0 and at most 1")
    if domains.penalty < 0:
        found.append(f"domains.penalty: {domains.penalty} must be at least 0")
    if domains.sinkhorn_steps < 1:
        found.append(f"domains.sinkhorn_steps: {domains.sinkhorn_steps} must be at least 1")
    if not 0 < domains.osf_share < 1:
        found.append(f"domains.osf_share: {domains.osf_share} must be over 0 and under 1")
    if any(seed < 0 for seed in domains.seeds) or len(set(domains.seeds)) < len(domains.seeds):
        found.append(f"domains.seeds: {domains.seeds} must be whole numbers, 0 or more, each once")
    return found + (_sequence_problems(config) if config.data.domains else [])


def _sequence_problems(config: RunConfig) -> list[str]:
    names, method = config.data.domains, config.domains.method
    found = []
    if len(names) < 2 or len(set(names)) < len(names):
        found.append(f"data.domains: {names}; give two or more files of conf/data, each once")
    if config.runtime.num_processes > 1:
        found.append(
            f"runtime.num_processes: {config.runtime.num_processes} with data.domains, which one process trains; set 1"
        )
    if config.train.method is TrainMethod.full:
        found.append(
            "train.method: full with data.domains, whose ways are adapters; set train=lora, and for whole layers "
            "domains=osf"
        )
    if method is not DomainMethod.modular:
        found += _plain_lora_problems(config)
    if method is DomainMethod.osf:
        found += _osf_problems(config)
    if method is DomainMethod.orthogonal and config.train.optimizer is Optimizer.lora_fa:
        found.append("train.optimizer: lora_fa with domains.method orthogonal, whose penalty moves A, which it freezes")
    if method in (DomainMethod.osf, DomainMethod.constrained):
        if config.train.optimizer is Optimizer.lora_fa:
            found.append(f"train.optimizer: lora_fa with domains.method {method}, which trains more than A and B")
        if config.train.lora_plus_ratio is not None:
            found.append(
                f"train.lora_plus_ratio: {config.train.lora_plus_ratio} with domains.method {method}, which trains "
                "more than A and B; set null"
            )
    return found


def _plain_lora_problems(config: RunConfig) -> list[str]:
    """A training goes on with, or adds to, what another has saved: that has to be A and B of plain LoRA."""
    lora, method = config.lora, config.domains.method
    where = f"with domains.method {method}; domains=modular takes any adapter"
    found = []
    if lora.method is not AdapterMethod.lora:
        found.append(f"lora.method: {lora.method} {where}")
    if lora.start is not LoraStart.zero:
        found.append(f"lora.start: {lora.start} {where}")
    if lora.modules_to_save:
        found.append(f"lora.modules_to_save: {lora.modules_to_save} {where}")
    if config.model.new_tokens:
        found.append(f"model.new_tokens: {config.model.new_tokens} {where}")
    if lora.bias is not Bias.none:
        found.append(f"lora.bias: {lora.bias} {where}")
    if method in CHAINED:
        return found
    if lora.use_dora:
        found.append(f"lora.use_dora: true {where}")
    if lora.rank_pattern or lora.alpha_pattern:
        found.append(f"lora.rank_pattern, lora.alpha_pattern: set {where}")
    return found


def _osf_problems(config: RunConfig) -> list[str]:
    found = []
    if config.train.method is not TrainMethod.lora or config.quantization.method is not QuantizationMethod.none:
        found.append(
            "domains.method: osf changes the weights, and a quantised base cannot hold the change; set train=lora "
            "quantization=none"
        )
    if config.model.dtype is not Dtype.float32:
        found.append(
            f"model.dtype: {config.model.dtype} with domains.method osf, whose steps it does not resolve; set float32"
        )
    if config.lora.adapter_dtype is not Dtype.float32:
        found.append(f"lora.adapter_dtype: {config.lora.adapter_dtype} with domains.method osf; set float32")
    if config.lora.use_rslora or config.lora.lora_dropout:
        found.append("lora.use_rslora, lora.lora_dropout: set with domains.method osf, which has neither; unset them")
    return found
