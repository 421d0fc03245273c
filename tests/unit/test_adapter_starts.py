"""Warm starts: the papers' equations, what is saved for the base as it was, resumed to the byte, and their guards."""

import logging
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pipeline import adapter_starts, finetuning, guards, loftq, start_factors, start_inputs
from pipeline.adapter_starts import ResidualHooks
from pipeline.batching import collate
from pipeline.dataset import load_split
from pipeline.errors import ModelError, TrainingError
from pipeline.files import hash_path
from pipeline.finetuning import prepare
from pipeline.lora import attach_adapter
from pipeline.merging import merge_adapter
from pipeline.quantization import quantize
from pipeline.runtime import seed_everything
from pipeline.schema import Dtype
from pipeline.start_factors import corda, eva, lora_layers, olora, pissa, update_OI, weight_OI
from pipeline.start_inputs import input_moments
from tests.standins import CPU, make_model, merge_config, model_config
from tests.trained import Stopped, load, logits, make_base, merge_inputs, settings, train

RESIDUAL = ("pissa", "olora", "corda")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("starts"))


def start(folder: Path, name: str, *more: str):
    return settings(folder, [f"lora.start={name}", *more], quantized=name == "loftq")


def prepared(folder: Path, config):
    seed_everything(0)
    return prepare(load(folder, config), config, load_split(folder / "processed", "train"), 0)


@pytest.fixture
def w_OI() -> torch.Tensor:
    return torch.randn(12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_pissa_takes_the_largest_singular_values(w_OI: torch.Tensor) -> None:
    U, S, Vh = torch.linalg.svd(w_OI, full_matrices=False)
    A, B = pissa(w_OI, 3, scaling=2.0)
    root = torch.diag(S[:3]).sqrt()
    torch.testing.assert_close(2.0 * B @ A, (U[:, :3] @ root) @ (root @ Vh[:3]))  # B = U S^1/2, A = S^1/2 V^T
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))  # the roots on both sides
    assert torch.linalg.norm(w_OI - 2.0 * B @ A, ord=2) < 1.0001 * S[3]
    without = pissa(w_OI, 3, scaling=1.0)
    assert torch.linalg.norm(w_OI - 2.0 * without[1] @ without[0], ord=2) > 1.5 * S[3]  # the scaling forgotten


def test_olora_takes_the_first_of_the_qr_factors(w_OI: torch.Tensor) -> None:
    Q, R = torch.linalg.qr(w_OI)
    A, B = olora(w_OI, 3, scaling=2.0)
    torch.testing.assert_close(B.T @ B, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(w_OI - B @ A, Q[:, 3:] @ R[3:])
    assert not torch.allclose(w_OI - 2.0 * B @ A, Q[:, 3:] @ R[3:])


def test_corda_sees_the_weight_through_its_inputs(w_OI: torch.Tensor) -> None:
    x_NI = torch.randn(50, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_NI[:, 0] *= 100
    C = x_NI.T @ x_NI
    damped = C + 0.01 * C.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(w_OI @ damped)
    A, B = corda(w_OI, C, 3, scaling=2.0)
    torch.testing.assert_close(2.0 * B @ A, U[:, :3] @ torch.diag(S[:3]) @ Vh[:3] @ torch.linalg.inv(damped))
    whole = corda(w_OI, C, 9, scaling=2.0)
    torch.testing.assert_close(2.0 * whole[1] @ whole[0], w_OI)
    lost = ((w_OI - 2.0 * B @ A) @ x_NI.T).norm()
    plain = pissa(w_OI, 3, 2.0)
    assert lost < 0.5 * ((w_OI - 2.0 * plain[1] @ plain[0]) @ x_NI.T).norm()  # PiSSA does not see the inputs


def test_corda_keeps_its_ranks_where_one_input_is_far_larger() -> None:
    """As in models with massive activations; in float32 all ranks but the first count as rounding (the control)."""
    w_OI = torch.randn(16, 2048, generator=torch.Generator().manual_seed(0))
    moment = torch.diag(torch.cat([torch.tensor([1e8]), torch.ones(2047)]))
    _, B = corda(w_OI, moment, 3, scaling=2.0)
    assert B.any(dim=0).all()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(2048)
    _, S, _ = start_factors._largest(w_OI @ damped, 3)
    assert S[0] > 0
    assert not S[1:].any()


def test_eva_takes_the_directions_that_vary_most() -> None:
    x_NI = torch.randn(200, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_NI = x_NI * torch.arange(1, 10) + 50  # a mean that would hide the variance
    centred = x_NI - x_NI.mean(dim=0)
    A = eva(centred.T @ centred, 3)
    _, _, Vh = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close((A @ Vh[:3].T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-8, rtol=0)
    beside = eva(x_NI.T @ x_NI, 3)
    assert (beside[0] @ Vh[:3].T).norm() < 0.9  # with the mean in it the first direction is the mean


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_pefts_start_is_the_same(made: Path, name: str) -> None:
    config = start(made, name)
    ours = prepared(made, config).model
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(load(made, config), peft.LoraConfig(init_lora_weights=name, **options))
    for name, layer in lora_layers(ours).items():
        same = theirs.get_submodule(name)
        torch.testing.assert_close(update_OI(layer), update_OI(same), atol=1e-5, rtol=0)
        torch.testing.assert_close(weight_OI(layer), weight_OI(same), atol=1e-5, rtol=0)


def test_pefts_eva_comes_near(made: Path) -> None:
    """Its SVD is incremental, a batch at a time, each cut to the rank: it explains a little less variance than ours."""
    config = start(made, "eva")
    model = prepared(made, config).model
    split, base = load_split(made / "processed", "train"), load(made, config)
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": "eva"}
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(eva_config=peft.EvaConfig(rho=1.0, tau=0.999), **options), low_cpu_mem_usage=False
    )
    batches = []
    for first in range(0, 24, 8):
        batch = collate(split, list(range(first, first + 8)), 0)
        labels = batch.input_ids.masked_fill(~batch.completion_mask, -100)
        batches.append({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels})
    peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    for name, covariance in input_moments(model, lora_layers(model), config, split, 0):
        ours, other = (m.get_submodule(name).lora_A["default"].weight.detach() for m in (model, theirs))
        random = torch.linalg.qr(torch.randn(other.shape, generator=torch.Generator().manual_seed(0)).T)[0].T
        explained = [float((A @ covariance @ A.T).trace()) for A in (ours, other, random)]
        assert explained[0] >= 0.9999 * explained[1]
        assert explained[1] > 0.8 * explained[0]
        assert explained[2] < 0.6 * explained[0]


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"lora.start={name}"] for name in RESIDUAL),
        ["lora.start=pissa", "lora.use_rslora=true", "lora.use_dora=true"],
        ["lora.start=olora", "of single layers"],
        ["lora.start=corda", "lora.bias=all"],
        ["lora.start=pissa", "lora.adapter_dtype=bfloat16"],
    ],
    ids=lambda overrides: " ".join(o.removeprefix("lora.") for o in overrides),
)
def test_what_is_saved_fits_the_base_as_it_was(
    made: Path, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(made, [o for o in overrides if "=" in o])
    if "of single layers" in overrides:
        config.lora.rank_pattern, config.lora.alpha_pattern = {"q_proj": 2}, {"down_proj": 5.0}
    models, after_save = [], ResidualHooks.after_save

    def watched(hooks, folder: Path) -> None:
        shutil.copytree(folder, tmp_path / "plain")  # as if it were LoRA on the base as it was
        after_save(hooks, folder)

    def kept(*arguments):
        models.append(prepare(*arguments))
        return models[0]

    monkeypatch.setattr(ResidualHooks, "after_save", watched)
    monkeypatch.setattr(finetuning, "prepare", kept)
    metrics = train(made, config, tmp_path / "adapter")
    assert metrics["validation_loss"] < metrics["validation_loss_before"]
    expected = logits(models[0].model.eval())
    exact = config.lora.adapter_dtype is Dtype.float32
    limit = (1e-5 if exact else 2e-2) * float(expected.abs().max())
    found = logits(load(made, config, tmp_path / "adapter"))
    assert (found - expected).abs().max() < limit
    assert (found - logits(load(made, config))).abs().max() > 5 * limit
    assert (logits(load(made, config, tmp_path / "plain")) - expected).abs().max() > 5 * limit


@pytest.mark.parametrize("decompose", [pissa, olora])
def test_transposed_weights_too(decompose) -> None:
    torch.manual_seed(0)
    small = GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=32, initializer_range=0.3,
                       bos_token_id=1, eos_token_id=2)  # fmt: skip
    base = GPT2LMHeadModel(small).eval()
    before = logits_of_ids(base)
    model = attach_adapter(base, settings(Path(), ["lora.target_modules=[c_attn,c_fc]"]).lora).eval()
    for layer in lora_layers(model).values():
        start_factors.move_into_adapter(layer, *decompose(weight_OI(layer), *start_factors.size(layer)))
        assert update_OI(layer).norm() > 0.1 * weight_OI(layer).norm()
    torch.testing.assert_close(logits_of_ids(model), before, atol=1e-4, rtol=0)


@torch.no_grad()
def logits_of_ids(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(3, 20)[None]).logits


@pytest.mark.parametrize("name", ["corda", "loftq"])  # corda reads rows, as eva, and changes the base, as pissa
def test_stopped_and_gone_on_with_it_is_the_same_training(made: Path, tmp_path: Path, name: str) -> None:
    config = start(made, name)
    train(made, config, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(made, config, tmp_path / "resumed", stop_at=5)
    train(made, config, tmp_path / "resumed")
    assert hash_path(tmp_path / "resumed") == hash_path(tmp_path / "whole")


def elsewhere(w_OI: torch.Tensor, rank: int, scaling: float) -> start_factors.Factors:
    """Another machine's PiSSA: other signs, and another of two directions that are as good."""
    A_RI, B_OR = pissa(w_OI, rank + 1, scaling)
    return -A_RI[1:], -B_OR[:, 1:]


def test_a_checkpoint_of_another_start_goes_on_with_it(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = start(made, "pissa")
    train(made, config, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(made, config, tmp_path / "resumed", stop_at=5)
    monkeypatch.setattr(adapter_starts, "pissa", elsewhere)
    with caplog.at_level(logging.INFO, "pipeline.adapter_starts"):
        train(made, config, tmp_path / "resumed")
    assert "another start here than where the checkpoint was made, in 14 of 14 layers" in caplog.text
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-4, rtol=1e-4)
    train(made, config, tmp_path / "other")
    other = load_file(tmp_path / "other/adapter_model.safetensors")
    assert any((other[name] - tensor).abs().max() > 1e-2 for name, tensor in whole.items())


@pytest.mark.parametrize("factor", [1.0005, 1.5])
def test_the_base_gives_the_checkpoints_part(made: Path, factor: float) -> None:
    config = start(made, "pissa")
    ready = prepared(made, config)
    layers, plain = lora_layers(ready.model), load(made, config)
    then = {name: [A, factor * B] for name, (A, B) in ready.hooks.state()["starts"].items()}
    ready.hooks.load_state({"starts": then})
    for name, stored in ready.hooks.state()["starts"].items():
        assert all(torch.equal(*pair) for pair in zip(stored, then[name], strict=True))
    for name, layer in layers.items():
        weight = plain.get_submodule(name.removeprefix("base_model.model.")).weight
        torch.testing.assert_close(weight_OI(layer), weight - factor * update_OI(layer), atol=1e-6, rtol=0)
    now = {name: weight_OI(layer).clone() for name, layer in layers.items()}
    ready.hooks.load_state({"starts": then})
    assert all(torch.equal(weight_OI(layer), now[name]) for name, layer in layers.items())


def test_a_base_that_changes_after_another_start_is_still_found(made: Path, tmp_path: Path) -> None:
    ready = prepared(made, start(made, "pissa"))
    then = {name: [-A, -1.01 * B] for name, (A, B) in ready.hooks.state()["starts"].items()}
    ready.hooks.load_state({"starts": then})
    next(p for n, p in ready.model.named_parameters() if "lora_B" in n).data[0, 0] += 1e-3
    ready.finish(tmp_path / "adapter")
    next(p for n, p in ready.model.named_parameters() if "base_layer" in n).data[0, 0] += 1e-3
    with pytest.raises(TrainingError, match="training changed 1 weights of the frozen base"):
        ready.finish(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["olora", "eva", "loftq"])
def test_merged_it_is_the_model_that_trained(made: Path, tmp_path: Path, name: str) -> None:
    config = start(made, name)
    train(made, config, tmp_path / "adapter")
    inputs = merge_inputs(made, config, tmp_path / "adapter")
    metrics = merge_adapter(inputs, merge_config(), tmp_path / "merged", CPU)
    assert metrics["mean_kl"] < 1e-6
    expected = logits(load(made, config, tmp_path / "adapter"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (found - logits(load(made, config))).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("keep", ["never", "always"])
def test_loftq_starts_nearer_to_the_original(made: Path, keep: str, caplog: pytest.LogCaptureFixture) -> None:
    config = start(made, "loftq", f"runtime.keep_quantized={keep}")
    with caplog.at_level(logging.INFO, "pipeline.loftq"):
        model = prepared(made, config).model
    assert "of what it was" in caplog.text
    original = load_file(made / "base/model.safetensors")
    for name, layer in lora_layers(model).items():
        lost = original[name.removeprefix("base_model.model.") + ".weight"] - weight_OI(layer)
        _, S, _ = torch.linalg.svd(lost)
        assert (lost - update_OI(layer)).norm() < 1.0001 * S[4:].norm()  # no rank of 4 comes nearer
        assert S[4:].norm() < 0.99 * lost.norm()
    before = logits(load(made, config))
    goal = logits(load(made, settings(made, [])))
    assert (logits(model) - goal).norm() < (before - goal).norm()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model(torch.arange(3, 35)[None], labels=torch.arange(3, 35)[None]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_layers_that_quantisation_spared_start_as_lora(tmp_path: Path) -> None:
    make_base(tmp_path)
    skips = "quantization.skip_modules=[lm_head,q_proj]"
    config = start(tmp_path, "loftq", skips)
    validation = load_split(tmp_path / "processed", "validation")
    quantize(config.model, config.quantization, validation, tmp_path / "quantized", CPU)
    model = prepared(tmp_path, config).model
    plain = prepared(tmp_path, start(tmp_path, "zero", skips, "train=qlora", "quantization=nf4")).model
    found = gradients(model)
    for name, layer in lora_layers(model).items():
        A, B = start_factors.factors_of(layer)
        assert bool(found[f"{name}.lora_B.default.weight"].any())  # it learns
        if "q_proj" in name:
            assert torch.equal(A, start_factors.factors_of(plain.get_submodule(name))[0])
            assert not B.any()
        else:
            assert B.any()


def test_a_weight_of_less_rank_leaves_the_rest_of_the_adapter_as_lora(made: Path) -> None:
    config = start(made, "pissa")
    base = load(made, config)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[2:] = 0
    seed_everything(0)
    model = prepare(base, config, load_split(made / "processed", "train"), 0).model
    A, B = start_factors.factors_of(lora_layers(model)["base_model.model.model.layers.0.mlp.up_proj"])
    assert B[:, :2].norm(dim=0).min() > 1e-2
    assert not B[:, 2:].any()
    assert A[2:].norm(dim=1).min() > 1e-2
    whole = start_factors.factors_of(lora_layers(model)["base_model.model.model.layers.1.mlp.up_proj"])
    assert whole[1].norm(dim=0).min() > 1e-2


@pytest.mark.parametrize("name", ["pissa", "corda"])
def test_a_weight_of_zeros_takes_no_part(name: str, w_OI: torch.Tensor) -> None:
    arguments = (torch.eye(9, dtype=torch.float64),) if name == "corda" else ()
    A, B = getattr(start_factors, name)(torch.zeros_like(w_OI), *arguments, 3, 2.0)
    assert not A.any()
    assert not B.any()


def test_a_correction_without_the_scaling_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loftq, "loftq", lambda lost, rank, scaling: start_factors.loftq(lost, rank, 1.0))  # peft's
    with pytest.raises(TrainingError, match=r"lora\.start loftq leaves"):
        prepared(made, start(made, "loftq"))


def test_logits_other_than_the_corrected_weights_give_are_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted = finetuning.predicted_logits

    def of_the_base(model, start, base_SV, batch):
        return base_SV

    monkeypatch.setattr(finetuning, "predicted_logits", of_the_base)
    with pytest.raises(TrainingError, match="step 0"):
        prepared(made, start(made, "loftq"))
    monkeypatch.setattr(finetuning, "predicted_logits", predicted)
    prepared(made, start(made, "loftq"))


def test_a_base_that_lost_another_part_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_starts, "move_into_adapter", start_factors.set_factors)  # the base keeps all
    with pytest.raises(TrainingError, match="step 0"):
        prepared(made, start(made, "pissa"))


def test_inputs_are_measured_without_padding(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = start(made, "corda", "lora.start_rows=6", "train.micro_batch_size=4")
    split = load_split(made / "processed", "train")
    model = attach_adapter(load(made, config), config.lora).eval()
    layers = lora_layers(model)
    found = dict(input_moments(model, layers, config, split, 0))
    monkeypatch.setattr(start_inputs, "MOMENTS_BYTES", 1)  # a pass for each layer
    for name, moment in input_moments(model, layers, config, split, 0):
        assert torch.equal(moment, found[name])
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    rows = finetuning_rows(split, 6)
    decoder = load(made, config).model
    with torch.no_grad():
        inputs = [
            decoder.layers[0].input_layernorm(decoder.embed_tokens(torch.tensor(split.input_ids(row).tolist())))
            for row in rows
        ]
    x_NI = torch.cat(inputs)
    torch.testing.assert_close(found[name], x_NI.T @ x_NI / len(x_NI), atol=1e-4, rtol=1e-4)
    eva_config = start(made, "eva", "lora.start_rows=6")
    supervised = torch.cat(
        [x[torch.tensor(split.completion_mask(row).tolist()).bool()] for x, row in zip(inputs, rows, strict=True)]
    )
    covariance = dict(input_moments(model, layers, eva_config, split, 0))[name]
    torch.testing.assert_close(covariance, torch.cov(supervised.T, correction=0), atol=1e-4, rtol=1e-4)


def finetuning_rows(split, count: int) -> list[int]:
    return start_inputs.rows_of_step(len(split), count, 0, 0)


class Flat(torch.nn.Module):
    """A layer whose input its decoder gives as [B * T, I]; with `routed` only some of them."""

    def __init__(self, layer: torch.nn.Module, routed: bool):
        super().__init__()
        self.layer, self.routed = layer, routed

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        x_NI = x_BTI.flatten(0, 1)
        chosen = len(x_NI) // 2 if self.routed else len(x_NI)
        y_NO = torch.cat([self.layer(x_NI[:chosen]), x_NI.new_zeros(len(x_NI) - chosen, self.layer.out_features)])
        return y_NO.unflatten(0, x_BTI.shape[:2])


@pytest.mark.parametrize("name", ["eva", "corda"])
def test_inputs_without_rows_are_measured_too(made: Path, name: str) -> None:
    config = start(made, name, "lora.start_rows=6", "train.micro_batch_size=4", "lora.target_modules=[up_proj]")
    split = load_split(made / "processed", "train")
    path = "base_model.model.model.layers.0.mlp"
    model = attach_adapter(load(made, config), config.lora).eval()
    expected = dict(input_moments(model, lora_layers(model), config, split, 0))[f"{path}.up_proj"]
    mlp = model.get_submodule(path)
    layer = mlp.up_proj
    for routed in (False, True):
        mlp.up_proj = Flat(layer, routed)
        layers = {f"{path}.up_proj": layer}
        if not routed:
            assert torch.equal(dict(input_moments(model, layers, config, split, 0))[f"{path}.up_proj"], expected)
            continue
        with pytest.raises(TrainingError, match=r"model\.layers\.0\.mlp\.up_proj gets \d+ inputs for the \d+ tokens"):
            list(input_moments(model, layers, config, split, 0))


def test_a_gpu_gives_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"bytes": 2**30}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 2**40))
    layers = {name: torch.nn.Linear(8192, 1, device="meta") for name in "abcde"}  # 256 MiB each
    gpu = torch.device("cuda", 0)
    assert [len(group) for group in start_inputs._groups(layers, start_inputs._moments_bytes(gpu))] == [1] * 5
    free["bytes"] = 2 * 2**30
    assert [len(group) for group in start_inputs._groups(layers, start_inputs._moments_bytes(gpu))] == [2, 2, 1]
    free["bytes"] = 2**40
    assert start_inputs._moments_bytes(gpu) == start_inputs._moments_bytes(CPU) == start_inputs.MOMENTS_BYTES


@pytest.mark.parametrize("name", ["pissa", "eva"])
def test_too_little_memory_for_the_start_is_said(made: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(adapter_starts, name, runs_out)
    with pytest.raises(TrainingError, match=rf"lora\.start {name} \(CUDA out of memory.*") as found:
        prepared(made, start(made, name))
    assert {"lora.start_rows", "train.micro_batch_size"} <= set(str(found.value).replace(",", "").split())

    def breaks(*arguments):
        raise RuntimeError("mat1 and mat2")

    monkeypatch.setattr(adapter_starts, name, breaks)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        prepared(made, start(made, name))


def test_too_few_tokens_are_refused(made: Path, make_split) -> None:
    config = start(made, "eva", "lora.start_rows=1")
    model = attach_adapter(load(made, config), config.lora).eval()
    with pytest.raises(TrainingError, match=r"1 rows have 3 tokens to look at, fewer than the rank, 4"):
        list(input_moments(model, lora_layers(model), config, make_split([(4, 3)]), 0))


def test_original_weights_are_found_in_shards_and_multimodal_files(tmp_path: Path) -> None:
    model = make_model(tmp_path / "one", "gemma3_multimodal")
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    weight = model.get_submodule("model.language_model").layers[1].mlp.up_proj.weight
    for folder in ("one", "shards"):
        read = loftq.original_weights(model_config(tmp_path / folder))
        assert torch.equal(read("model.layers.1.mlp.up_proj"), weight)
    with pytest.raises(ModelError, match=r"holds no model.layers.7.mlp.up_proj.weight"):
        read("model.layers.7.mlp.up_proj")


def test_an_untouched_start_is_no_training(made: Path) -> None:
    ready = prepared(made, start(made, "pissa"))
    before = guards.trainable_checksums(ready.model)
    guards.check_adapter_moved(ready.model)  # B is not zero
    with pytest.raises(TrainingError, match="what it was before"):
        guards.check_adapter_moved(ready.model, before)
    next(p for n, p in ready.model.named_parameters() if "lora_B" in n).data[0, 0] += 1e-3
    guards.check_adapter_moved(ready.model, before)
