"""Faster ways to the same numbers: packed rows, chunked logits, fused LoRA."""

import copy
from contextlib import nullcontext

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Llama4TextConfig,
    LlamaForCausalLM,
    PhimoeConfig,
)

import pipeline.fused_lora
import pipeline.losses
import pipeline.packing
from pipeline.batching import collate
from pipeline.config import compose_config
from pipeline.fused_lora import fused_lora
from pipeline.lora import attach_adapter
from pipeline.losses import ForwardPlan, plan_forward, supervised_logits, supervised_loss
from pipeline.packing import model_inputs, packed_attention, packed_sdpa
from pipeline.quantized_layers import quantize_model
from tests.standins import ARCHITECTURES, CPU, SIZES, make_model

LENGTHS = [(4, 3), (6, 19), (3, 2), (18, 55), (2, 12), (7, 1)]  # one longer than the sliding windows of the stand-ins
ROWS = list(range(len(LENGTHS)))


def alone(model: torch.nn.Module, split, row: int) -> torch.Tensor:
    """Logits of the row by itself, through the model's own attention."""
    return model(**model_inputs(collate(split, [row], 0))).logits[0]


def with_adapter(base: torch.nn.Module, *overrides: str):
    torch.manual_seed(1)
    model = attach_adapter(copy.deepcopy(base), compose_config(["lora.r=4", "lora.lora_dropout=0", *overrides]).lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES[:-1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_sees_itself_alone(kind: str, attention: str, make_split, tmp_path) -> None:
    model = make_model(tmp_path / kind, kind)
    model.set_attn_implementation(attention)
    split = make_split(LENGTHS)
    expected = [alone(model, split, row) for row in ROWS]
    with torch.no_grad(), plan_forward(model) as plan:
        assert plan == ForwardPlan(packed=attention == "sdpa", chunked=True)
        batch = collate(split, ROWS, 0, plan.packed)
        logits = model(**model_inputs(batch)).logits
    found = logits[0].split([len(row) for row in expected]) if plan.packed else logits
    for mine, theirs in zip(found, expected, strict=True):
        largest = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(mine[: len(theirs)] / largest, theirs / largest, rtol=0, atol=1e-5)
    assert model.config.get_text_config()._attn_implementation == attention


def test_rows_of_one_length_are_not_packed(make_split, tmp_path) -> None:
    model = make_model(tmp_path / "mistral", "mistral")  # with a sliding window of 64
    split = make_split([(60, 20), (4, 76), (40, 40)])
    expected = [alone(model, split, row) for row in range(3)]
    with torch.no_grad(), plan_forward(model) as plan:
        assert plan.packed
        batch = collate(split, [0, 1, 2], 0, plan.packed)
        assert batch.cu_seq_lens is None
        logits = model(**model_inputs(batch)).logits
    for mine, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * float(theirs.detach().abs().max()))


def test_a_leak_would_be_seen(tiny_llama: LlamaForCausalLM, make_split, monkeypatch, caplog) -> None:
    whole = pipeline.packing._attend

    def leak(module, query, key, value, attention_mask, scaling=None, **others):
        output = whole(query, key, value, 0.0, scaling, None, True)
        return output.transpose(1, 2), None

    monkeypatch.setitem(pipeline.packing.AttentionInterface._global_mapping, pipeline.packing.NAME, leak)
    with packed_attention(tiny_llama) as packed:
        assert not packed
        assert tiny_llama.config._attn_implementation == "sdpa"
    assert "rows are padded, which is slower: packed, its logits are not those of the rows alone" in caplog.text
    split = make_split(LENGTHS)
    with plan_forward(tiny_llama) as plan, torch.no_grad():
        loss, _ = supervised_loss(tiny_llama, collate(split, ROWS, 0, plan.packed), plan)
        expected, _ = supervised_loss(tiny_llama, collate(split, ROWS, 0))
    assert abs(loss - expected) < 1e-3


def test_what_attention_does_not_know_is_left_to_the_model(tiny_llama: LlamaForCausalLM, caplog) -> None:
    for layer in tiny_llama.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, own=forward, **kwargs: own(*args, softcap=20.0, **kwargs)
    with pytest.raises(ValueError, match="softcap"), packed_attention(tiny_llama):
        pass  # torch's attention does not know it either, and says so before anything is packed


@pytest.mark.parametrize("chunk_elements", [2**24, 96 * 7])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_padded_rows(
    tiny_llama: LlamaForCausalLM, make_split, monkeypatch, chunk_elements: int, checkpointing: bool
) -> None:
    monkeypatch.setattr(pipeline.losses, "CHUNK_ELEMENTS", chunk_elements)
    split = make_split(LENGTHS)

    def gradients(fast: bool):
        model = with_adapter(tiny_llama).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if fast:
            with plan_forward(model) as plan:
                assert plan == ForwardPlan(packed=True, chunked=True)
                loss, count = supervised_loss(model, collate(split, ROWS, 0, packed=True), plan)
                (loss / count).backward()
        else:
            loss, count = supervised_loss(model, collate(split, ROWS, 0))
            (loss / count).backward()
        return loss.item() / count, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    loss, found = gradients(fast=True)
    expected_loss, expected = gradients(fast=False)
    assert abs(loss - expected_loss) < 1e-5
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
        assert expected[name].abs().max() > 1e-3  # or the tolerance would say nothing


def test_no_more_logits_than_a_chunk_are_ever_made(tiny_llama: LlamaForCausalLM, make_split, monkeypatch) -> None:
    monkeypatch.setattr(pipeline.losses, "CHUNK_ELEMENTS", 96 * 7)
    sizes: list[int] = []
    tiny_llama.lm_head.register_forward_hook(lambda _, args, logits: sizes.append(logits.numel() // 96))
    batch = collate(make_split(LENGTHS), ROWS, 0)
    loss, count = supervised_loss(tiny_llama, batch, ForwardPlan(chunked=True))
    assert count == sum(completion for _, completion in LENGTHS)
    assert sizes[0] == 0  # the model's own call, left out
    assert max(sizes) == 7
    assert sum(sizes) == count
    loss.backward()
    assert sum(sizes) == 2 * count


@pytest.mark.parametrize(
    ("config", "packs"),
    [
        (Gemma2Config(**SIZES, query_pre_attn_scalar=16, final_logit_softcapping=5.0, sliding_window=64), False),
        (CohereConfig(**SIZES, logit_scale=0.25), True),
        (GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=4.0), True),
    ],
    ids=["gemma2", "cohere", "granite"],
)
def test_what_comes_after_the_output_head_is_known(config, packs: bool, make_split) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if not packs else "sdpa").eval()
    batch = collate(make_split(LENGTHS), ROWS, 0)
    with torch.no_grad(), plan_forward(model) as plan:
        assert plan == ForwardPlan(packed=packs, chunked=True)
    with torch.no_grad():
        expected, _ = supervised_loss(model, batch)
        found, _ = supervised_loss(model, batch, plan)
        assert abs(found - expected) / expected < 1e-5


def test_an_output_head_of_its_own_kind_is_left_to_the_model(tiny_llama: LlamaForCausalLM, make_split, caplog) -> None:
    forward = tiny_llama.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits - 3.0 * output.logits.tanh()
        return output

    tiny_llama.forward = shifted  # type: ignore[method-assign]
    split = make_split(LENGTHS)
    with torch.no_grad(), plan_forward(tiny_llama) as plan:
        assert plan == ForwardPlan(packed=True, chunked=False)
        assert "output head is of its own kind" in caplog.text
        loss, _ = supervised_loss(tiny_llama, collate(split, ROWS, 0, packed=True), plan)
        expected = F.cross_entropy(
            *supervised_logits(tiny_llama, collate(split, ROWS, 0, packed=True)), reduction="sum"
        )
    assert loss == expected


@pytest.mark.parametrize("overrides", [[], ["lora.use_rslora=true"], ["lora.target_modules=[q_proj,down_proj]"]])
@pytest.mark.parametrize("way", ["folded", "delta", "bfloat16", "nf4"])
def test_fused_lora_is_lora(
    tiny_llama: LlamaForCausalLM, make_split, monkeypatch, overrides: list[str], way: str
) -> None:
    batch = collate(make_split(LENGTHS), ROWS, 0)
    if way == "delta":
        monkeypatch.setattr(pipeline.fused_lora, "LARGEST_FOLDED", 0)
    is_16_bit = way in ("bfloat16", "nf4")
    base = copy.deepcopy(tiny_llama).to(torch.bfloat16) if is_16_bit else tiny_llama
    if way == "nf4":
        quantize_model(base, compose_config(["quantization.compute_dtype=bfloat16"]).quantization, CPU)
    results = []
    for fuses in (True, False):
        model = with_adapter(base, *overrides)
        with fused_lora(model) if fuses else nullcontext(0) as num_layers:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_16_bit):
                loss, _ = supervised_loss(model, batch)
            loss.backward()
        assert num_layers == (sum("lora_A" in name for name, _ in model.named_parameters()) if fuses else 0)
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, found), (expected_loss, expected) = results
    assert loss == pytest.approx(expected_loss, rel=3e-3 if is_16_bit else 1e-5)
    for name in expected:
        assert found[name].dtype is expected[name].dtype is torch.float32
        distance = (found[name] - expected[name]).norm() / expected[name].norm()
        assert distance < (5e-2 if is_16_bit else 1e-5), name
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("overrides", [["lora.use_dora=true"], ["lora.lora_dropout=0.1"]])
def test_other_loras_are_left_to_peft(tiny_llama: LlamaForCausalLM, overrides: list[str]) -> None:
    with fused_lora(with_adapter(tiny_llama, *overrides)) as num_layers:
        assert num_layers == 0


def test_a_kept_4_bit_layer_of_another_dtype_than_autocast(tiny_llama: LlamaForCausalLM, make_split) -> None:
    base = copy.deepcopy(tiny_llama)
    quantize_model(base, compose_config(["quantization.compute_dtype=float32"]).quantization, CPU)
    model, batch = with_adapter(base), collate(make_split(LENGTHS), ROWS, 0)
    losses = []
    for fuses in (True, False):
        with fused_lora(model) if fuses else nullcontext(), torch.autocast("cpu", torch.bfloat16):
            loss, _ = supervised_loss(model, batch)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=3e-3)


def test_no_tokens_other_adapters_and_a_context_in_another(tiny_llama: LlamaForCausalLM) -> None:
    model = with_adapter(tiny_llama)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    with fused_lora(model) as num_layers:
        assert layer(torch.zeros(0, 128)).shape == (0, 64)  # an expert that gets no token
        with fused_lora(model) as inside:
            assert (num_layers > 0, inside) == (True, 0)
        assert "forward" in vars(layer)
    for part in (layer.lora_A, layer.lora_B):
        part["other"] = part.pop("default")
    with fused_lora(model):
        assert "forward" not in vars(layer)


@pytest.mark.parametrize("bias", [False, True])
def test_a_bias_is_not_lost(bias: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24, bias=bias))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 5, 16)
    expected = adapted(x)
    with fused_lora(adapted) as num_layers:
        assert num_layers == 1
        torch.testing.assert_close(adapted(x), expected)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (PhimoeConfig(**SIZES, num_local_experts=4, sliding_window=16), "its window of 16 tokens is done by a mask"),
        (PhimoeConfig(**SIZES, num_local_experts=4, sliding_window=None), None),
        (
            Llama4TextConfig(
                **SIZES, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=16, no_rope_layers=[1, 1]
            ),
            "its attention in chunks of 16 tokens is done by a mask",
        ),
    ],
    ids=["window", "no_window", "chunks"],
)
def test_a_window_that_only_a_mask_makes_is_not_packed(config, said: str | None, caplog) -> None:
    """The probe's rows are shorter than any window: what counts is whether attention is told of it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with packed_attention(model) as packs:
        assert packs is (said is None)
    assert said is None or said in caplog.text


def test_packed_attention_refuses_what_it_does_not_know() -> None:
    query = torch.randn(1, 2, 4, 8)
    module = torch.nn.Module()
    for unknown in ({"softcap": 30.0}, {"s_aux": query}):
        with pytest.raises(NotImplementedError, match=next(iter(unknown))):
            packed_sdpa(module, query, query, query, None, **unknown)
    with pytest.raises(NotImplementedError, match="attention mask"):
        packed_sdpa(module, query, query, query, torch.ones(1, 1, 4, 4))


def test_the_adapter_can_still_be_turned_off(tiny_llama: LlamaForCausalLM, make_split) -> None:
    model = with_adapter(tiny_llama).eval()
    inputs = model_inputs(collate(make_split(LENGTHS), ROWS, 0))
    with torch.no_grad(), fused_lora(model):
        changed = model(**inputs).logits
        with model.disable_adapter():
            base = model(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(base, tiny_llama(**inputs).logits)
    assert (changed - base).abs().max() > 1e-2
