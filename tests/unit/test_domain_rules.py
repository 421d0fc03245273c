"""What of data.domains and domains.* is refused before anything loads."""

import copy
from typing import Any

import pytest

from pipeline.config import compose_config
from pipeline.domain_rules import domain_problems
from pipeline.errors import ConfigError
from pipeline.schema import (
    AdapterMethod,
    DomainMethod,
    Dtype,
    LoraStart,
    Optimizer,
    QuantizationMethod,
    RunConfig,
    TrainMethod,
)

ORTHOGONAL = {"domains.method": DomainMethod.orthogonal}
CONSTRAINED = {"domains.method": DomainMethod.constrained}
MODULAR = {"domains.method": DomainMethod.modular}
OSF = {"domains.method": DomainMethod.osf}


@pytest.fixture(scope="module")
def sound() -> RunConfig:
    return compose_config(["data.domains=[contracts,other]", "train=lora", "quantization=none", "model.dtype=float32"])


def problems(sound: RunConfig, changes: dict[str, Any]) -> list[str]:
    config = copy.deepcopy(sound)
    for key, value in changes.items():
        group, name = key.split(".")
        setattr(getattr(config, group), name, value)
    return domain_problems(config)


@pytest.mark.parametrize("method", list(DomainMethod))
def test_every_way_is_sound(sound: RunConfig, method: DomainMethod) -> None:
    assert problems(sound, {"domains.method": method}) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"domains.replay_share": 0.0, "data.domains": []}, "domains.replay_share"),
        ({"domains.penalty": -1.0, "data.domains": []}, "domains.penalty"),
        ({"domains.sinkhorn_steps": 0, "data.domains": []}, "domains.sinkhorn_steps"),
        ({"domains.osf_share": 1.0, "data.domains": []}, "domains.osf_share"),
        ({"domains.seeds": [1, 1], "data.domains": []}, "domains.seeds"),
        ({"data.domains": ["contracts"]}, "data.domains"),
        ({"data.domains": ["contracts", "contracts"]}, "data.domains"),
        ({"runtime.num_processes": 2}, "runtime.num_processes"),
        ({"train.method": TrainMethod.full}, "train.method"),
        ({"lora.method": AdapterMethod.vera}, "lora.method"),
        ({"lora.start": LoraStart.pissa}, "lora.start"),
        ({"lora.modules_to_save": ["lm_head"]}, "lora.modules_to_save"),
        ({"model.new_tokens": ["<x>"]}, "model.new_tokens"),
        ({**ORTHOGONAL, "lora.use_dora": True}, "lora.use_dora"),
        ({**ORTHOGONAL, "lora.rank_pattern": {"q_proj": 4}}, "lora.rank_pattern, lora.alpha_pattern"),
        ({**CONSTRAINED, "train.lora_plus_ratio": 16.0}, "train.lora_plus_ratio"),
        ({**OSF, "train.optimizer": Optimizer.lora_fa}, "train.optimizer"),
        ({**ORTHOGONAL, "train.optimizer": Optimizer.lora_fa}, "train.optimizer"),
        ({**OSF, "quantization.method": QuantizationMethod.nf4}, "domains.method"),
        ({**OSF, "model.dtype": Dtype.bfloat16}, "model.dtype"),
        ({**OSF, "lora.lora_dropout": 0.1}, "lora.use_rslora, lora.lora_dropout"),
    ],
)
def test_what_cannot_be_is_named_once(sound: RunConfig, changes: dict[str, Any], named: str) -> None:
    (line,) = problems(sound, changes)
    assert line.startswith(f"{named}:")


def test_modular_takes_any_adapter_and_a_chain_takes_dora(sound: RunConfig) -> None:
    assert problems(sound, {**MODULAR, "lora.method": AdapterMethod.vera}) == []
    assert problems(sound, {"lora.use_dora": True}) == []


def test_without_domains_only_ranges_count(sound: RunConfig) -> None:
    assert problems(sound, {**OSF, "data.domains": [], "train.method": TrainMethod.full}) == []


def test_the_settings_are_checked_where_all_are() -> None:
    with pytest.raises(ConfigError, match=r"domains\.osf_share"):
        compose_config(["domains=osf", "domains.osf_share=1"])
