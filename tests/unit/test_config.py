"""Composing, checking and locking the settings."""

import dataclasses
import subprocess
import sys

import pytest

from pipeline.config import check_overrides, compose, compose_config, differences, dump
from pipeline.errors import ConfigError
from pipeline.launched import check_package
from pipeline.schema import RunConfig
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.rr=8", "did you mean lora.r?"),
        ("train.learning_rat=1e-3", "did you mean train.learning_rate?"),
        ("lora.r=abc", "lora.r"),
        ("data.shape=chat", "expected one of [instruction"),
        ("model=llama4", "Available options in 'model'"),
        ("lora.r", "lora.r"),
        ("lora.r=0", "lora.r: 0 must be at least 1"),
        ("lora.target_modules=[]", "lora.target_modules"),
        ("lora.lora_dropout=1.0", "lora.lora_dropout"),
        ("quantization.blocksize=60", "64, 128"),
        ("model=llama3_8b", "model.revision: None does not pin meta-llama"),
        ("data.path=../outside", "dvc add"),
        ("quantization=none", "train.method: qlora with quantization.method none"),
        ("data.shape=text", "evaluate=loss_only"),
        ("merge.max_shard_size=big", "5GB"),
        ("runtime.checkpoint_steps=0", "runtime.checkpoint_steps: 0 must be at least 1"),
        ("runtime.num_threads=0", "runtime.num_threads: 0 must be at least 1"),
        ("runtime.zero_stage=1", "runtime.zero_stage: 1 must be 2 or 3"),
        ("gate.conditions=[adapter.loss]", "gate.conditions: 'adapter.loss': 0 comparisons"),
    ],
)
def test_a_mistake_is_refused_with_the_remedy(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_config([override])
    assert said in str(error.value)
    assert "object_type" not in str(error.value)


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as error:
        compose_config(["lora.r=0", "train.micro_batch_size=0", "merge.parity_num_tokens=0"])
    assert all(key in str(error.value) for key in ("lora.r:", "train.micro_batch_size:", "merge.parity_num_tokens:"))


@pytest.mark.parametrize(
    ("runtime", "override", "said"),
    [
        ("fsdp", "train.optimizer=adamw_8bit", "with runtime.engine fsdp: bitsandbytes' optimizers"),
        ("deepspeed_zero2", "train.optimizer=paged_adamw_8bit", "set train.optimizer=adamw"),
        ("deepspeed_zero3", "train.mixed_precision=float16", "set bfloat16"),
        ("deepspeed_zero2", "train.on_spike=clip", "set train.on_spike=log"),
        ("deepspeed_zero3", "train.on_spike=skip", "set train.on_spike=log"),
        ("deepspeed_zero3", "lora.adapter_dtype=bfloat16", "set lora.adapter_dtype=float32"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_with_the_remedy(runtime: str, override: str, said: str) -> None:
    compose_config([f"runtime={runtime}"])
    compose_config([override])
    with pytest.raises(ConfigError) as error:
        compose_config([f"runtime={runtime}", override])
    assert said in str(error.value)


def test_a_missing_deepspeed_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.launched.find_spec", lambda name: None)
    check_package(compose_config(["runtime=ddp"]).runtime)
    with pytest.raises(ConfigError, match="pip install"):
        check_package(compose_config(["runtime=deepspeed_zero2"]).runtime)


def test_alpha_follows_the_rank_unless_given() -> None:
    assert compose_config(["lora.r=16"]).lora.lora_alpha == 32
    assert compose_config(["lora.r=16", "lora.lora_alpha=16"]).lora.lora_alpha == 16


def test_every_value_of_a_sweep_is_checked_before_anything_runs() -> None:
    check_overrides(["lora.r=4,8", "train.learning_rate=1e-3,2e-3"], "run")
    with pytest.raises(ConfigError, match=r"with lora.r=0 .*"):
        check_overrides(["lora.r=4,0", "train.learning_rate=1e-3,2e-3"], "run")


def test_params_yaml_is_what_conf_composes_to() -> None:
    assert (ROOT / "params.yaml").read_text(encoding="utf-8") == dump(compose([]))


def test_differences_name_the_keys() -> None:
    assert differences("lora: {r: 8}\n", "lora: {r: 4, x: 1}\n") == [
        "lora.r: 8 in params.yaml, 4 composed from conf/",
        "lora.x: (missing) in params.yaml, 1 composed from conf/",
    ]
    assert differences("lora: {r: 8\n", "lora: {r: 8}\n")[0].startswith("params.yaml is not YAML: while parsing")


def test_every_setting_has_its_value_in_conf_and_none_in_code() -> None:
    def defaults(schema: type) -> list[str]:
        return [f.name for f in dataclasses.fields(schema) if f.default not in (dataclasses.MISSING, "???")]

    groups = [f.type for f in dataclasses.fields(RunConfig)]
    assert [name for group in groups if dataclasses.is_dataclass(group) for name in defaults(group)] == []  # type: ignore[arg-type]


def test_the_engine_imports_without_the_packages_it_does_not_need() -> None:
    blocked = ["hydra", "omegaconf", "mlflow", "dvc", "datasets"]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport pipeline.finetuning"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_block_of_imports_can_fail() -> None:
    code = "import sys\nsys.modules['hydra'] = None\nimport pipeline.config"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
