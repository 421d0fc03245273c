"""bitsandbytes' hazards (0.50.2), each with the negative control that shows bitsandbytes' own behaviour."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

from pipeline.bnb import bnb
from pipeline.dataset import load_split
from pipeline.quantization import load_quantized, quantize
from pipeline.schema import Dtype, KeepQuantized
from tests.standins import CPU, ROOT, make_model, model_config, quantization_config, write_processed

REPACKS = bool(bnb.functional.has_avx512bf16())
only_where_it_repacks = pytest.mark.skipif(
    not REPACKS, reason="the negative control needs a CPU with AVX512-BF16 (lscpu), where bitsandbytes repacks"
)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    make_model(folder / "base", "mistral")  # widths that the repacking takes: the corruption is silent
    validation = load_split(write_processed(folder / "processed", 2), "validation")
    quantize(model_config(folder / "base"), quantization_config(), validation, folder / "q", CPU)
    return folder / "q"


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def with_adapter(base: torch.nn.Module) -> peft.PeftModel:
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return model


def gradients(model: peft.PeftModel) -> torch.Tensor:
    model.train()
    model.zero_grad()
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def evaluate(model: peft.PeftModel) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch()).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_gradients_survive_an_evaluation_on_a_kept_base(quantized: Path) -> None:
    base = load_quantized(quantized, quantization_config(), CPU, KeepQuantized.always)
    weights = {n: m.weight.data.clone() for n, m in base.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    model = with_adapter(base)
    before = gradients(model)
    evaluate(model)
    assert torch.equal(gradients(model), before)
    evaluate(model)
    assert torch.equal(gradients(model), before)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(layers) == len(weights) == 14
    for (_, layer), expected in zip(layers.items(), weights.values(), strict=True):
        assert torch.equal(layer.weight.data, expected)


@only_where_it_repacks
def test_gradients_do_not_survive_it_in_bitsandbytes(quantized: Path) -> None:
    """Negative control: without `protect_from_repacking` the test above sees gradients that are wrong by half."""
    base = load_quantized(quantized, quantization_config(), CPU, KeepQuantized.always)
    for layer in base.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = True  # what bitsandbytes sets by itself
    model = with_adapter(base)
    before = gradients(model)
    evaluate(model)
    assert relative(gradients(model), before) > 0.1


def test_kept_base_and_dequantised_base_train_bit_equal_on_a_cpu(quantized: Path) -> None:
    results = []
    for keep in (KeepQuantized.always, KeepQuantized.never):
        model = with_adapter(load_quantized(quantized, quantization_config(), CPU, keep))
        results.append((evaluate(model), gradients(model)))
    (kept_logits, kept_gradients), (plain_logits, plain_gradients) = results
    assert torch.equal(kept_logits, plain_logits)
    assert torch.equal(kept_gradients, plain_gradients)


def test_bit_equality_of_the_bases_holds_in_bfloat16_too(tmp_path: Path) -> None:
    """Of the bases: with fp32 adapters peft rounds its sums elsewhere in its 4-bit layer than in its plain one."""
    config = quantization_config(compute_dtype=Dtype.bfloat16)
    make_model(tmp_path / "base", "mistral")
    validation = load_split(write_processed(tmp_path / "processed", 2), "validation")
    quantize(model_config(tmp_path / "base"), config, validation, tmp_path / "q", CPU)
    kept, plain = (load_quantized(tmp_path / "q", config, CPU, k) for k in (KeepQuantized.always, KeepQuantized.never))
    assert torch.equal(evaluate(kept), evaluate(plain))


def test_state_dict_after_an_evaluation_is_the_one_before(quantized: Path) -> None:
    base = load_quantized(quantized, quantization_config(), CPU, KeepQuantized.always)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    evaluate(base)
    after = base.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture
def trap(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """An environment with a package `kernels` that leaves a mark when bitsandbytes asks it for a kernel of the Hub."""
    mark = tmp_path / "downloaded"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(
        "def get_kernel(*args, **kwargs):\n"
        f"    open({str(mark)!r}, 'w').close()\n"
        "    raise RuntimeError('no network')\n"
    )
    return {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, mark


def run(code: str, env: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_import_of_peft_comes_after_the_guard() -> None:
    """peft imports bitsandbytes: a module that imports either at its top has imported `pipeline.bnb` by then."""
    found = 0
    for path in [*(ROOT / "pipeline").glob("*.py"), *(ROOT / "stages").glob("*.py")]:
        names = []
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        late = [i for i, name in enumerate(names) if name.split(".")[0] in ("peft", "bitsandbytes")]
        found += len(late)
        assert not late or "pipeline.bnb" in names[: late[0]], path
    assert found


@pytest.mark.parametrize("modules", ["pipeline.lora", "stages.train, stages.evaluate, stages.merge"])
def test_importing_the_project_downloads_no_kernel(modules: str, trap: tuple[dict[str, str], Path]) -> None:
    env, mark = trap
    run(f"import {modules}, sys; assert 'bitsandbytes' in sys.modules", env)
    assert not mark.exists()


@only_where_it_repacks
def test_importing_bitsandbytes_alone_does(trap: tuple[dict[str, str], Path]) -> None:
    env, mark = trap
    run("import bitsandbytes", env)
    assert mark.exists()
