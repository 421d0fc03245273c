"""The memory plan against what is really allocated and what autograd really saves."""

import dataclasses
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.architecture import read_architecture
from pipeline.batching import Batch
from pipeline.bnb import bnb
from pipeline.config import compose_config
from pipeline.errors import ConfigError
from pipeline.lora import attach_lora
from pipeline.losses import plan_forward, supervised_loss
from pipeline.memory import (
    alternatives,
    disk_bytes,
    flops_per_token,
    largest_length,
    largest_micro_batch,
    plan_memory,
    setup_of,
    smallest,
    trainable_parameters,
    usable_bytes,
)
from pipeline.memory_simulation import simulate_step
from pipeline.optimizers import make_optimizer
from pipeline.quantized_layers import dequantize, quantize_model, quantized_layers
from pipeline.runtime import torch_dtype
from pipeline.schema import Engine, TrainMethod

SIZES = {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 5, "num_attention_heads": 4, "vocab_size": 1000,
    "max_position_embeddings": 2048,
}  # fmt: skip
MODELS = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32},
    "gemma": {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 32, "pad_token_id": 0},
    "neox": {"model_type": "gpt_neox"},
    "gpt2": {"model_type": "gpt2", "attn_pdrop": 0.0},
}
GPT2_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
METHODS = {
    "full": ["train.method=full"],
    "full_8bit": ["train.method=full", "train.optimizer=adamw_8bit"],
    "lora_bf16": ["train.method=lora", "model.dtype=bfloat16"],
    "lora_dora_8bit": ["train.method=lora", "lora.use_dora=true", "train.optimizer=adamw_8bit", "lora.r=64"],
    "kept": ["quantization.compute_dtype=bfloat16"],
    "kept_single": ["quantization.double_quant=false", "quantization.blocksize=128"],
    "kept_int8": ["quantization=int8", "quantization.compute_dtype=bfloat16"],
    "once": ["quantization.compute_dtype=bfloat16"],
}


def read(name: str, **changes):
    shape = SIZES | changes
    if name == "gpt2":
        shape = {GPT2_NAMES.get(key, key): value for key, value in shape.items() if key != "intermediate_size"}
    return read_architecture(AutoConfig.for_model(**MODELS[name], **shape), name)


def setup(overrides, length=256, device="cpu", keeps=False):
    config = compose_config(["train.micro_batch_size=2", "quantization.skip_modules=[]", *overrides])
    return setup_of(config, device, length=length, keeps_quantized=keeps)


def build(architecture, plan, seed=0):
    """The model as the stages build it, its adapter attached."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(architecture.config, dtype=torch.float32)
    if plan.method is TrainMethod.full:
        return model.requires_grad_(True)
    if plan.method is TrainMethod.qlora:
        quantize_model(model, plan.quantization, torch.device("cpu"))
        if not plan.keeps_quantized:
            dequantize(model, torch_dtype(plan.quantization.compute_dtype))
    else:
        model.to(torch_dtype(plan.model_dtype))
    return attach_lora(model.requires_grad_(False), plan.lora)


def allocated(model, plan) -> int:
    """Bytes of weights, scales, gradients and optimizer states after a step."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(plan.train, trainable)
    optimizer.step()
    tensors = [*model.parameters(), *(p.grad for p in trainable)]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    for _, layer in quantized_layers(model):
        if isinstance(layer, bnb.nn.Linear8bitLt):
            tensors.append(layer.weight.SCB)
            continue
        state = layer.weight.quant_state
        tensors += [state.absmax, state.code]
        tensors += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_states_agree_with_the_bytes_allocated_to_one_percent(name: str, method: str) -> None:
    architecture, plan = read(name), setup(METHODS[method], keeps=method.startswith("kept"))
    if name == "gpt2" and plan.method is TrainMethod.qlora:
        with pytest.raises(ConfigError, match="no linear layer to quantise"):
            plan_memory(architecture, plan)
        return
    planned = plan_memory(architecture, plan)
    found = allocated(build(architecture, plan), plan)
    assert planned.states == pytest.approx(found, rel=0.01)
    assert (planned.scales > 0) is plan.keeps_quantized


def test_another_setting_is_more_than_one_percent_away() -> None:
    architecture = read("llama")
    of = {
        name: plan_memory(architecture, setup(METHODS[name], keeps=name.startswith("kept"))).states for name in METHODS
    }
    ordered = sorted(of.values())
    assert all(b > 1.01 * a for a, b in itertools.pairwise(ordered))


def make_batch(architecture, plan) -> Batch:
    ids = torch.randint(3, architecture.vocab_size, (plan.micro_batch_size, plan.length))
    everything = torch.ones_like(ids)
    return Batch(ids, everything.bool(), attention_mask=everything, max_length=plan.length)


def saved_bytes(architecture, plan) -> int:
    """What autograd saves in the decoder's forward: storages, parameters left out."""
    model = build(architecture, plan).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}
    open_ended = [True]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if open_ended and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    head = getattr(model, "base_model", model).get_output_embeddings() if plan.method is TrainMethod.full else None
    head = head or model.get_base_model().get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda *_: open_ended.clear())
    precision = plan.train.mixed_precision
    with plan_forward(model) as forward_plan:
        open_ended[:] = [True]
        autocast = torch.autocast("cpu", torch_dtype(precision or "float32"), enabled=precision is not None)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            loss, _ = supervised_loss(model, make_batch(architecture, plan), forward_plan)
    hook.remove()
    del loss
    return sum(storage.nbytes() for storage in kept.values())


ACTIVATIONS = {
    "full": ["train.method=full"],
    "full_autocast": ["train.method=full", "train.mixed_precision=bfloat16"],
    "lora": ["train.method=lora", "model.dtype=float32"],
    "lora_bf16": ["train.method=lora", "model.dtype=bfloat16"],
    "lora_autocast": ["train.method=lora", "model.dtype=float32", "train.mixed_precision=bfloat16"],
    "lora_dropout": ["train.method=lora", "model.dtype=float32", "lora.lora_dropout=0.1"],
}


@pytest.mark.parametrize("method", ACTIVATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_saves(name: str, method: str) -> None:
    architecture, plan = read(name), setup(ACTIVATIONS[method])
    planned = simulate_step(architecture, plan, accumulates=False).saved
    assert planned == pytest.approx(saved_bytes(architecture, plan), rel=0.02)


def test_activations_grow_with_what_makes_them_grow() -> None:
    architecture, plan = read("llama"), setup(ACTIVATIONS["lora"], length=400)

    def saved(**changes) -> int:
        return simulate_step(architecture, dataclasses.replace(plan, **changes), accumulates=False).saved

    assert saved(micro_batch_size=4) == pytest.approx(2 * saved(), rel=0.01)
    assert saved(length=800) == pytest.approx(2 * saved(), rel=0.01)  # fused attention keeps no scores
    hidden_states = plan.micro_batch_size * plan.length * architecture.hidden_size * 4
    checkpointed = saved(gradient_checkpointing=True)
    assert 5 * hidden_states <= checkpointed < 8 * hidden_states < 0.2 * saved()


def test_more_layers_are_extrapolated_to_what_they_take() -> None:
    plan = setup(ACTIVATIONS["full"])
    few, many = (simulate_step(read("llama", num_hidden_layers=n), plan, accumulates=False) for n in (3, 9))
    middle = simulate_step(read("llama", num_hidden_layers=6), plan, accumulates=False)
    assert middle.saved == pytest.approx((few.saved + many.saved) / 2, rel=0.001)


def test_the_largest_fits_and_the_next_does_not() -> None:
    architecture, plan = read("llama"), setup(ACTIVATIONS["lora_bf16"], length=1024, device="cuda")
    capacity = 2 * 2**30
    usable = usable_bytes(capacity, "cuda")
    rows = largest_micro_batch(architecture, plan, capacity)

    def total(**changes) -> int:
        return plan_memory(architecture, dataclasses.replace(plan, **changes)).total

    assert total(micro_batch_size=rows) <= usable < total(micro_batch_size=rows + max(1, rows // 32) + 1)
    assert largest_length(architecture, plan, capacity) == architecture.max_context
    assert largest_micro_batch(architecture, plan, 700 * 2**20) == 0
    assert usable_bytes(capacity, "cuda") < capacity == usable_bytes(capacity, "cpu")


def test_the_smallest_setup_takes_least() -> None:
    architecture, plan = read("llama"), setup(ACTIVATIONS["lora"], length=1024, device="cuda")
    assert plan_memory(architecture, smallest(plan)).total < plan_memory(architecture, plan).total


def test_the_columns_of_the_plan() -> None:
    config = compose_config(["quantization.compute_dtype=bfloat16", "model.dtype=float32"])
    architecture = read("llama", hidden_size=512, intermediate_size=1408)
    memory = {name: plan_memory(architecture, plan) for name, plan in alternatives(config, "cuda", 128).items()}
    assert list(memory) == ["full", "lora", "lora int8", "qlora"]
    assert memory["full"].weights == 2 * memory["lora"].weights > 2 * memory["lora int8"].weights
    assert memory["lora int8"].weights > memory["qlora"].weights
    assert memory["full"].adapter == 0 < memory["lora"].adapter == memory["qlora"].adapter


def test_processes_share_what_their_engine_shares() -> None:
    architecture, plan = read("llama"), setup(METHODS["full"], device="cuda")
    alone = plan_memory(architecture, plan)
    ddp, fsdp, zero2 = (
        plan_memory(architecture, dataclasses.replace(plan, num_processes=4, engine=engine))
        for engine in (Engine.ddp, Engine.fsdp, Engine.deepspeed)
    )
    assert ddp.states == alone.states
    assert fsdp.states == pytest.approx(alone.states / 4, rel=1e-6)
    assert zero2.states == pytest.approx(alone.weights + (alone.states - alone.weights) / 4, rel=1e-6)


def test_trainable_parameters_are_those_of_the_adapter() -> None:
    for overrides in (
        [],
        ["lora.target_modules=attention", "lora.use_dora=true"],
        ["lora.bias=all"],
        ["lora.bias=lora_only"],
    ):
        architecture, plan = read("qwen2"), setup(["train.method=lora", *overrides])
        real = sum(p.numel() for p in build(architecture, plan).parameters() if p.requires_grad)
        assert trainable_parameters(architecture, plan) == real


@pytest.mark.parametrize("overrides", [ACTIVATIONS["full"], ACTIVATIONS["lora"]])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_flops_are_those_that_torch_counts(overrides, checkpointing: str) -> None:
    architecture = read("llama", vocab_size=200)
    plan = setup([*overrides, f"train.gradient_checkpointing={checkpointing}", "lora.r=4"], length=16)
    model = build(architecture, plan).train()
    if plan.gradient_checkpointing:
        inner = model if plan.method is TrainMethod.full else model.get_base_model()
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with plan_forward(model) as forward_plan, FlopCounterMode(display=False) as counter:
        loss, _ = supervised_loss(model, make_batch(architecture, plan), forward_plan)
        loss.backward()
    per_token = counter.get_total_flops() / (plan.micro_batch_size * plan.length)
    assert flops_per_token(architecture, plan) == pytest.approx(per_token, rel=0.1)


def test_disk_takes_what_the_files_hold(tmp_path) -> None:
    config = compose_config(
        ["quantization.compute_dtype=bfloat16", "merge.dtype=bfloat16", "quantization.skip_modules=[]"]
    )
    architecture = read("llama")
    plan = setup_of(config, "cpu", length=64, keeps_quantized=True)
    model = build(architecture, plan)
    model.save_pretrained(tmp_path / "adapter")
    model.get_base_model()
    bytes_of = disk_bytes(architecture, config)
    assert bytes_of["adapter"] == pytest.approx(
        (tmp_path / "adapter/adapter_model.safetensors").stat().st_size, rel=0.03
    )
    assert bytes_of["merged"] == 2 * architecture.num_parameters
    assert bytes_of["checkpoints"] >= 3 * 4 * bytes_of["adapter"]
