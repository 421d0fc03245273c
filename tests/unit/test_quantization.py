"""The quantised base: what is written, what comes back, what it costs; on shapes that bitsandbytes misreads too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import quantization
from pipeline.bnb import (
    _compile_later,
    bnb,
    check_bitsandbytes,
    check_kept_layers,
    dequantize_4bit,
    params_4bit,
    protect_from_repacking,
)
from pipeline.dataset import load_split
from pipeline.errors import ConfigError, ModelError
from pipeline.modeling import load_model
from pipeline.quantization import load_quantized, load_training_base, quantize
from pipeline.quantized_layers import dequantize_weight, linear_names, quantize_model
from pipeline.schema import Dtype, KeepQuantized, TrainMethod
from tests.standins import ARCHITECTURES, CPU, make_model, model_config, quantization_config, write_processed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_model(folder)  # its MLP is 172 wide
    return folder


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory):
    return load_split(write_processed(tmp_path_factory.mktemp("processed"), 6), "validation")


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids)).logits.float()


def expected_weights(codes: torch.Tensor, state) -> torch.Tensor:
    """4-bit codes to weights in plain torch: table times the scale of the code's block, blocks running on over rows."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed = codes.view(-1).int()
    values = state.code[torch.stack([packed >> 4, packed & 15], 1).view(-1)][: state.shape.numel()]
    return (values * absmax.repeat_interleave(state.blocksize)[: values.numel()]).view(state.shape)


@pytest.mark.parametrize("shape", [(96, 172), (64, 352), (128, 96), (48, 64), (128, 128)])
@pytest.mark.parametrize(("kind", "blocksize"), [("nf4", 64), ("fp4", 64), ("nf4", 128), ("nf4", 1024)])
def test_dequantising_is_right_for_every_width(shape: tuple[int, int], kind: str, blocksize: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=blocksize, quant_type=kind, compress_statistics=True)
    assert torch.equal(dequantize_4bit(codes, state, torch.float32), expected_weights(codes, state))


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the kernel in question is the AVX512 one"
)
def test_bitsandbytes_itself_misreads_such_widths() -> None:
    """The negative control: when this fails, bitsandbytes has mended its kernel and `dequantize_4bit` can be plain."""
    weight = torch.randn(64, 352, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    right, theirs = expected_weights(codes, state), bnb.functional.dequantize_4bit(codes, state)
    assert (theirs - right).norm() / right.norm() > 0.1


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_saved_folder_loads_as_it_was_quantised(base: Path, validation, tmp_path: Path, method: str) -> None:
    config = quantization_config(method)
    held = load_model(model_config(base), CPU)
    quantize_model(held, config, CPU)
    codes = {
        name: module.weight.data.clone() for name, module in held.named_modules() if hasattr(module, "quant_state")
    }
    quantize(model_config(base), config, validation, tmp_path / "q", CPU)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q")  # plain transformers, as anybody would
    assert {type(m) for m in loaded.modules() if "bitsandbytes" in type(m).__module__} == {
        bnb.nn.Linear8bitLt if method == "int8" else bnb.nn.Linear4bit
    }
    for name, expected in codes.items():
        assert torch.equal(loaded.get_submodule(name).weight.data.view(-1), expected.view(-1)), name
    ours = load_quantized(tmp_path / "q", config, CPU, KeepQuantized.never)
    for name, layer in held.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            assert torch.equal(ours.get_submodule(name).weight, dequantize_weight(layer, torch.float32)), name
    original = load_model(model_config(base), CPU)
    difference = (logits(ours) - logits(original)).abs().mean()
    assert 0 < difference < 0.5 * logits(original).std()
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_quantising_twice_gives_equal_bytes(base: Path, validation, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize(model_config(base), quantization_config(), validation, tmp_path / name, CPU)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert {"model.safetensors", "config.json", "tokenizer.json", "provenance.json"} <= set(files)
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_kept_and_dequantised_are_bit_equal_on_a_cpu(base: Path, validation, tmp_path: Path) -> None:
    quantize(model_config(base), quantization_config(), validation, tmp_path / "q", CPU)
    kept = load_quantized(tmp_path / "q", quantization_config(), CPU, KeepQuantized.always)
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in kept.modules())
    plain = load_quantized(tmp_path / "q", quantization_config(), CPU, KeepQuantized.auto)
    assert not any("bitsandbytes" in type(m).__module__ for m in plain.modules())
    assert torch.equal(logits(kept), logits(plain))
    assert not torch.equal(logits(kept), logits(load_model(model_config(base), CPU)))
    assert getattr(plain.config, "quantization_config", None) is None


def test_keeping_a_width_that_the_kernel_misreads_is_refused(tmp_path: Path, validation) -> None:
    make_model(tmp_path / "base", intermediate_size=352)  # babyllama361's MLP
    quantize(model_config(tmp_path / "base"), quantization_config(), validation, tmp_path / "q", CPU)
    right = load_quantized(tmp_path / "q", quantization_config(), CPU)
    error = (
        right.model.layers[0].mlp.down_proj.weight
        - load_model(model_config(tmp_path / "base"), CPU).model.layers[0].mlp.down_proj.weight
    ).norm()
    assert error / right.model.layers[0].mlp.down_proj.weight.norm() < 0.12
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        with pytest.raises(ModelError, match=r"down_proj.*width 352.*runtime\.keep_quantized=never"):
            load_quantized(tmp_path / "q", quantization_config(), CPU, KeepQuantized.always)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_quantises_and_loads_back(kind: str, tmp_path: Path, validation) -> None:
    original = make_model(tmp_path / "base", kind)
    metrics, layers = quantize(model_config(tmp_path / "base"), quantization_config(), validation, tmp_path / "q", CPU)
    assert metrics["num_quantized_layers"] == 14 == len(layers)
    loaded = load_quantized(tmp_path / "q", quantization_config(), CPU)
    assert loaded.get_output_embeddings().weight.dtype is torch.float32
    tied = bool(getattr(original.config.get_text_config(), "tie_word_embeddings", False))
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied
    stored = json.loads((tmp_path / "q" / "config.json").read_text())
    assert stored["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]


def test_compute_dtype_is_that_of_all_arithmetic(base: Path, validation, tmp_path: Path) -> None:
    config = quantization_config(compute_dtype=Dtype.bfloat16)
    quantize(model_config(base), config, validation, tmp_path / "q", CPU)
    for keep in (KeepQuantized.always, KeepQuantized.never):
        model = load_quantized(tmp_path / "q", config, CPU, keep)
        assert model(torch.tensor([[5, 6, 7]])).logits.dtype is torch.bfloat16
    kept = load_quantized(tmp_path / "q", config, CPU, KeepQuantized.always)
    assert {m.weight.quant_state.dtype for m in kept.modules() if isinstance(m, bnb.nn.Linear4bit)} == {torch.bfloat16}


def test_a_16_bit_base_with_fp32_arithmetic_is_fp32_throughout(base: Path, validation, tmp_path: Path) -> None:
    config = quantization_config()
    quantize(model_config(base, dtype=Dtype.bfloat16), config, validation, tmp_path / "q", CPU)
    for keep in (KeepQuantized.always, KeepQuantized.never):
        model = load_quantized(tmp_path / "q", config, CPU, keep)
        assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
        assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({}, 4 + 8 / 64 + 32 / (64 * 256)),  # 4.127: QLoRA (arXiv 2305.14314), section 3
        ({"double_quant": False}, 4.5),
        ({"blocksize": 128}, 4 + 8 / 128 + 32 / (128 * 256)),
        ({"blocksize": 256, "double_quant": False}, 4 + 32 / 256),
    ],
)
def test_bits_per_quantized_parameter(tmp_path: Path, changes: dict, bits: float) -> None:
    make_model(tmp_path, "llama3", hidden_size=512, intermediate_size=512, head_dim=128, num_key_value_heads=4)
    model = load_model(model_config(tmp_path), CPU)
    layers = quantize_model(model, quantization_config(**changes), CPU)
    for layer in layers:
        assert layer.bits_per_parameter == pytest.approx(bits, abs=2e-4)
        assert 0.07 < layer.relative_error < 0.13
    states = [m.weight.quant_state for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert {s.blocksize for s in states} == {changes.get("blocksize", 64)}
    assert {s.nested for s in states} == {changes.get("double_quant", True)}


def test_metrics_are_those_of_the_files_and_the_models(base: Path, validation, tmp_path: Path) -> None:
    metrics, layers = quantize(model_config(base), quantization_config(), validation, tmp_path / "q", CPU)
    model = load_model(model_config(base), CPU)
    assert metrics["bytes_before"] == 4 * model.num_parameters()
    assert metrics["bytes_after"] == (tmp_path / "q" / "model.safetensors").stat().st_size
    assert metrics["num_quantized_parameters"] == sum(
        m.weight.numel() for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"
    )
    assert metrics["loss_difference"] == metrics["quantized"]["loss"] - metrics["base"]["loss"] != 0
    assert metrics["quantized"]["num_tokens"] == int(validation.num_supervised.sum())
    assert metrics["relative_error_max"] == max(layer.relative_error for layer in layers)
    json.dumps(metrics, allow_nan=False)


def test_method_none_writes_provenance_alone(base: Path, validation, tmp_path: Path) -> None:
    metrics, layers = quantize(model_config(base), quantization_config("none"), validation, tmp_path / "q", CPU)
    assert [p.name for p in (tmp_path / "q").iterdir()] == ["provenance.json"]
    assert (metrics, layers) == ({"method": "none"}, [])
    with pytest.raises(ModelError, match="holds no quantized base"):
        load_quantized(tmp_path / "q", quantization_config(), CPU)
    with pytest.raises(ConfigError, match=r"quantization\.method is none"):
        load_training_base(model_config(base), quantization_config("none"), TrainMethod.qlora, tmp_path / "q", CPU)


def test_skipped_modules_stay_and_unmatched_names_stop(base: Path, validation, tmp_path: Path) -> None:
    config = quantization_config(skip_modules=["down_proj", "layers.1.self_attn"])
    quantize(model_config(base), config, validation, tmp_path / "q", CPU)
    kept = load_quantized(tmp_path / "q", config, CPU, KeepQuantized.always)
    plain = {n for n, m in kept.named_modules() if type(m) is torch.nn.Linear}
    assert plain == {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"} | {
        f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"
    }
    model = load_model(model_config(base), CPU)
    with pytest.raises(ConfigError, match=r"'c_attn' matches no linear layer; this model has down_proj, gate_proj"):
        linear_names(model, ["c_attn"])
    with pytest.raises(ConfigError, match="matches no linear layer"):
        linear_names(model, ["proj"])  # a part of a component is no name
    with pytest.raises(ConfigError, match="leaves no linear layer"):
        linear_names(model, ["model"])


def test_training_base_follows_the_method(base: Path, validation, tmp_path: Path) -> None:
    quantize(model_config(base), quantization_config(), validation, tmp_path / "q", CPU)
    arguments = (model_config(base), quantization_config())
    original = logits(load_model(model_config(base), CPU))
    for method, is_original in ((TrainMethod.lora, True), (TrainMethod.full, True), (TrainMethod.qlora, False)):
        loaded = load_training_base(*arguments, method, tmp_path / "q", CPU)
        assert torch.equal(logits(loaded), original) is is_original


def test_broken_base_is_refused(base: Path, tmp_path: Path) -> None:
    model = load_model(model_config(base), CPU)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight: holds NaN"):
        quantize_model(model, quantization_config(), CPU)


def test_all_zero_blocks_stay_zero(base: Path) -> None:
    for method in ("nf4", "fp4", "int8"):
        model = load_model(model_config(base), CPU)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[:5] = 0
        quantize_model(model, quantization_config(method, double_quant=False), CPU)
        restored = dequantize_weight(model.model.layers[0].mlp.up_proj, torch.float32)
        assert torch.isfinite(restored).all()
        assert (restored[:5] == 0).all()


def test_failure_while_writing_leaves_no_folder(base: Path, validation, tmp_path: Path, monkeypatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantization, "write_provenance", full)
    with pytest.raises(ModelError, match="disk was full"):
        quantize(model_config(base), quantization_config(), validation, tmp_path / "q", CPU)
    assert list(tmp_path.iterdir()) == []


def test_damaged_quantized_folder_is_refused(base: Path, validation, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    quantize(model_config(base), quantization_config(), validation, tmp_path / "q", CPU)
    path = tmp_path / "q" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError):
        load_quantized(tmp_path / "q", quantization_config(), CPU)


def test_int8_cannot_be_kept_on_a_cpu(base: Path, validation, tmp_path: Path) -> None:
    quantize(model_config(base), quantization_config("int8"), validation, tmp_path / "q", CPU)
    with pytest.raises(ConfigError, match=r"runtime\.keep_quantized: always does not go with .* int8 on a CPU"):
        load_quantized(tmp_path / "q", quantization_config("int8"), CPU, KeepQuantized.always)


def test_bitsandbytes_is_tried_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    check_bitsandbytes(CPU)
    right = bnb.functional.quantize_4bit
    monkeypatch.setattr(bnb.functional, "quantize_4bit", lambda w, **kwargs: right(w * 1.5, **kwargs))
    with pytest.raises(ModelError, match=r"round trip is off by 0\.5"):
        check_bitsandbytes(CPU)

    def no_library(*args: object, **kwargs: object) -> None:
        raise RuntimeError("libbitsandbytes_cuda124.so: cannot open shared object file")

    monkeypatch.setattr(bnb.functional, "quantize_4bit", no_library)
    with pytest.raises(ModelError, match=r"does not run on cpu .*libbitsandbytes_cuda124.*installed: bitsandbytes"):
        check_bitsandbytes(CPU)


def test_a_wrong_product_of_a_kept_layer_is_found() -> None:
    layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4", device="meta")
    codes, state = bnb.functional.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
    layer.weight = params_4bit(codes, state, layer)
    assert protect_from_repacking(layer) == 1
    check_kept_layers(layer.eval())
    layer.forward = lambda x: 1.05 * bnb.nn.Linear4bit.forward(layer, x)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"4-bit product on cpu is off by 0\.05"):
        check_kept_layers(layer)


def test_importing_bitsandbytes_compiles_nothing() -> None:
    """Nor imports what would: `torch.compile` does at once."""
    code = """
import sys, torch
own = torch.compile
import pipeline.bnb
assert torch.compile is own
assert "torch._inductor.compile_fx" not in sys.modules
torch.compile(lambda x: x)  # negative control
assert "torch._inductor.compile_fx" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_function_of_bitsandbytes_is_compiled_when_it_is_called() -> None:
    asked: list[tuple[object, dict[str, bool]]] = []

    def compile_now(function, **options):
        asked.append((function, options))
        return lambda x: function(x) + 1

    def double(x: int) -> int:
        return 2 * x

    later = _compile_later(compile_now, double, dynamic=False)
    assert not asked
    assert later.__name__ == "double"
    assert [later(3), later(4)] == [7, 9]
    assert asked == [(double, {"dynamic": False})]
