"""The loop: order of rows, accumulation, keeping the best, stopping early, repeatability."""

import copy
import dataclasses
import itertools
import shutil
import statistics

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import LlamaForCausalLM

import pipeline.training
from pipeline.checkpoints import Checkpoints
from pipeline.config import compose_config
from pipeline.errors import TrainingError
from pipeline.lora import attach_adapter
from pipeline.method_hooks import MethodHooks
from pipeline.schema import OnSpike
from pipeline.spikes import highest_zscore
from pipeline.training import Trainer, num_steps, rows_of_step

LENGTHS = [(4, 3), (6, 9), (3, 2), (8, 5), (2, 12), (7, 1), (5, 5), (9, 4)]


def settings(**changes):
    overrides = ["train.max_steps=6", "train.eval_steps=3", "train.micro_batch_size=4", "train.learning_rate=1e-2"]
    return dataclasses.replace(compose_config(overrides).train, **changes)


def run(
    base: LlamaForCausalLM, make_split, checkpoints: Checkpoints | None = None, lengths=LENGTHS, dropout=0.0, **changes
):
    torch.manual_seed(0)
    lora = compose_config(["lora.r=4", f"lora.lora_dropout={dropout}"]).lora
    model = attach_adapter(copy.deepcopy(base), lora)
    events: list[tuple[int, dict]] = []
    trainer = Trainer(
        model, make_split(lengths), make_split(lengths[:4], seed=5, name="validation"), settings(**changes), 0,
        lambda step, event: events.append((step, event)), progress_bar=False,
    )  # fmt: skip
    progress = trainer.run(checkpoints)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return progress, weights, events


def test_every_row_comes_once_an_epoch_in_another_order() -> None:
    rows = [row for step in range(8) for row in rows_of_step(10, 5, seed=3, step=step)]
    epochs = [rows[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert rows != [row for step in range(8) for row in rows_of_step(10, 5, seed=4, step=step)]


def test_a_step_may_span_epochs() -> None:
    rows = [row for step in range(5) for row in rows_of_step(3, 7, seed=0, step=step)]
    assert len(rows) == 35
    assert all(sorted(rows[i : i + 3]) == [0, 1, 2] for i in range(0, 33, 3))


def test_steps_follow_epochs_unless_given() -> None:
    assert (
        num_steps(settings(max_steps=None, num_epochs=2.0, micro_batch_size=4, gradient_accumulation_steps=2), 100)
        == 25
    )
    assert num_steps(settings(max_steps=7), 100) == 7


def test_how_a_step_is_cut_does_not_change_the_result(tiny_llama: LlamaForCausalLM, make_split) -> None:
    _, whole, _ = run(tiny_llama, make_split, micro_batch_size=4, gradient_accumulation_steps=1)
    _, cut, _ = run(tiny_llama, make_split, micro_batch_size=1, gradient_accumulation_steps=4)
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=0, atol=1e-5)
    _, other, _ = run(tiny_llama, make_split, micro_batch_size=3, gradient_accumulation_steps=1)
    assert any((other[name] - whole[name]).abs().max() > 1e-3 for name in whole)


def test_same_seed_same_bits(tiny_llama: LlamaForCausalLM, make_split) -> None:
    first, second, other = (run(tiny_llama, make_split, seed=seed)[1] for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_validation_does_not_change_the_training(tiny_llama: LlamaForCausalLM, make_split) -> None:
    _, often, _ = run(tiny_llama, make_split, eval_steps=1, keep=compose_config(["train.keep=last"]).train.keep)
    _, seldom, _ = run(tiny_llama, make_split, eval_steps=100, keep=compose_config(["train.keep=last"]).train.keep)
    assert all(torch.equal(often[name], seldom[name]) for name in often)


def test_the_best_weights_are_kept_and_training_stops_early(tiny_llama: LlamaForCausalLM, make_split) -> None:
    changes = {
        "max_steps": 40,
        "eval_steps": 1,
        "learning_rate": 0.3,
        "early_stopping_patience": 3,
        "max_grad_norm": None,
    }
    progress, best, events = run(tiny_llama, make_split, **changes)
    validation = {step: event["validation.loss"] for step, event in events if "validation.loss" in event}
    assert min(validation.values()) == progress.best_loss == validation[progress.best_step]
    assert max(validation) == progress.best_step + 3 < 40
    _, last, _ = run(tiny_llama, make_split, **changes, keep=compose_config(["train.keep=last"]).train.keep)
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_counts_leave_padding_out(tiny_llama: LlamaForCausalLM, make_split) -> None:
    progress, _, _ = run(tiny_llama, make_split, max_steps=2, micro_batch_size=4)
    assert progress.tokens_seen == sum(p + c for p, c in LENGTHS)
    assert progress.supervised_tokens_seen == sum(c for _, c in LENGTHS)


def test_nan_stops_with_the_rows(tiny_llama: LlamaForCausalLM, make_split) -> None:
    broken = copy.deepcopy(tiny_llama)
    broken.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"step 0: the validation loss is nan"):
        run(broken, make_split)
    with pytest.raises(TrainingError, match="made:"):
        run(tiny_llama, make_split, learning_rate=1e30, max_grad_norm=None, eval_steps=6)


def test_a_float16_overflow_leaves_the_step_out_and_the_training_goes_on(
    tiny_llama: LlamaForCausalLM, make_split
) -> None:
    model = attach_adapter(tiny_llama, compose_config(["lora.r=4"]).lora)
    chosen = settings(
        max_steps=24,
        eval_steps=24,
        mixed_precision=compose_config(["train.mixed_precision=float16"]).train.mixed_precision,
    )
    split = make_split(LENGTHS)
    norms: list[float] = []
    trainer = Trainer(
        model, split, split, chosen, 0, lambda _, event: norms.append(event.get("train.grad_norm", 1.0)),
        progress_bar=False,
    )  # fmt: skip
    scaler = scale_losses(trainer, 2.0**30)
    progress = trainer.run()
    assert norms.count(0.0) > 3
    assert 1 < scaler.get_scale() < 2.0**30
    assert progress.losses[-1] < progress.losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
def test_every_optimizer_and_schedule_learns(
    tiny_llama: LlamaForCausalLM, make_split, optimizer: str, scheduler: str
) -> None:
    chosen = compose_config([f"train.optimizer={optimizer}", f"train.lr_scheduler={scheduler}"]).train
    progress, _, events = run(
        tiny_llama,
        make_split,
        optimizer=chosen.optimizer,
        lr_scheduler=chosen.lr_scheduler,
        max_steps=8,
        eval_steps=8,
        warmup_ratio=0.25,
    )
    rates = [event["train.learning_rate"] for _, event in events if "train.learning_rate" in event]
    assert rates[0] < rates[2]
    assert (rates[-1] == rates[3]) is (scheduler == "constant")
    assert progress.losses[-1] < progress.losses[0]


class LittleMemory:
    """Stands in for a GPU: a forward over more tokens than fit raises what CUDA raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int, checkpointing_saves: int = 1):
        self.tokens, self.checkpointing_saves = tokens, checkpointing_saves
        forward = LlamaForCausalLM.forward

        def limited(model, *args, **kwargs):
            room = self.tokens * (self.checkpointing_saves if model.is_gradient_checkpointing else 1)
            room *= 1 if model.training else 4  # no activations are kept
            if kwargs["input_ids"].numel() > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(model, *args, **kwargs)

        monkeypatch.setattr(LlamaForCausalLM, "forward", limited)


LONG = [(3 * prompt, 3 * completion) for prompt, completion in LENGTHS]  # 9 to 45 tokens a row


@pytest.mark.parametrize(
    ("tokens", "saves", "size", "checkpointing"), [(95, 1, 2, False), (50, 1, 1, False), (30, 2, 1, True)]
)
def test_out_of_memory_cuts_the_step_smaller_and_changes_nothing(
    tiny_llama: LlamaForCausalLM,
    make_split,
    monkeypatch,
    caplog,
    tokens: int,
    saves: int,
    size: int,
    checkpointing: bool,
) -> None:
    whole, weights, _ = run(tiny_llama, make_split, lengths=LONG)
    LittleMemory(monkeypatch, tokens, saves)
    progress, cut, events = run(tiny_llama, make_split, lengths=LONG)
    assert (progress.micro_batch_size, progress.gradient_checkpointing) == (size, checkpointing)
    assert progress.losses == pytest.approx(whole.losses, abs=1e-5)
    for name in weights:
        torch.testing.assert_close(cut[name], weights[name], rtol=0, atol=1e-5)
    assert any(event.get("train.micro_batch_size") == size for _, event in events)
    assert "out of memory at step 1 (CUDA out of memory" in caplog.text


def test_a_resumed_training_keeps_to_what_fitted(
    tiny_llama: LlamaForCausalLM, make_split, monkeypatch, tmp_path, caplog
) -> None:
    LittleMemory(monkeypatch, 95)
    _, whole, _ = run(tiny_llama, make_split, Checkpoints(tmp_path / "c", 2, 1), lengths=LONG)
    shutil.copytree(tmp_path / "c", tmp_path / "again")
    caplog.clear()
    _, resumed, _ = run(tiny_llama, make_split, Checkpoints(tmp_path / "again", 2, 1), lengths=LONG, max_steps=6)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert "out of memory" not in caplog.text


@pytest.mark.parametrize("restores", [True, False])
def test_a_step_done_again_draws_the_same_dropout(
    tiny_llama: LlamaForCausalLM, make_split, monkeypatch, restores: bool
) -> None:
    changes = {"dropout": 0.5, "micro_batch_size": 1, "gradient_accumulation_steps": 4}
    whole, weights, _ = run(tiny_llama, make_split, **changes)
    forward, num_forwards = LlamaForCausalLM.forward, itertools.count(1)

    def fails_once(model, *args, **kwargs):
        if model.training and next(num_forwards) == 7:  # in the second step, after dropout was drawn for it
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", fails_once)
    if not restores:
        monkeypatch.setattr(pipeline.training, "set_torch_rng_state", lambda state: None)
    progress, again, _ = run(tiny_llama, make_split, **changes)
    assert progress.gradient_checkpointing is not whole.gradient_checkpointing
    same = progress.losses == pytest.approx(whole.losses, abs=1e-5)
    assert same is restores
    assert all(torch.allclose(again[name], weights[name], rtol=0, atol=1e-5) for name in weights) is restores


def test_what_can_never_fit_says_what_did(tiny_llama: LlamaForCausalLM, make_split, monkeypatch) -> None:
    LittleMemory(monkeypatch, 20, 2)
    with pytest.raises(TrainingError, match=r"one row at a time .*The longest row has 45 tokens; .*data\.max_length"):
        run(tiny_llama, make_split, lengths=LONG)


def test_other_errors_are_not_taken_for_memory(tiny_llama: LlamaForCausalLM, make_split, monkeypatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("expected scalar type Float but found Half")

    monkeypatch.setattr("pipeline.method_hooks.supervised_loss", broken)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        run(tiny_llama, make_split)


def test_zscores() -> None:
    recent = [(1.0 + 0.1 * (i % 5), 2.0 + 0.2 * (i % 3)) for i in range(40)]
    losses = [loss for loss, _ in recent]
    expected = (2.5 - statistics.fmean(losses)) / statistics.pstdev(losses)
    assert highest_zscore((2.5, 2.0), recent) == pytest.approx(expected)
    assert highest_zscore((1.0, 9.0), recent) > 30
    assert highest_zscore((1.2, 2.2), recent) < 1.5
    assert highest_zscore((99.0, 99.0), recent[:19]) == 0.0
    assert highest_zscore((1.01, 1.0), [(1.0, 1.0)] * 30) < 1  # hardly any deviation makes no spike of little


@pytest.mark.parametrize("action", list(OnSpike))
def test_a_spike_is_logged_clipped_or_skipped(
    tiny_llama: LlamaForCausalLM, make_split, monkeypatch, caplog, action: OnSpike
) -> None:
    accumulate = Trainer._accumulate

    def with_a_spike(trainer: Trainer, *args) -> float:
        loss = accumulate(trainer, *args)
        if trainer.progress.step == 30:
            for parameter in trainer.trainable.values():
                parameter.grad.mul_(1000.0)
        return loss

    monkeypatch.setattr(Trainer, "_accumulate", with_a_spike)
    norms: dict[int, float] = {}
    is_wanted = Trainer._update_is_wanted

    def watched(trainer: Trainer, *args) -> bool:
        wanted = is_wanted(trainer, *args)
        squares = (float(p.grad.square().sum()) for p in trainer.trainable.values())
        norms[trainer.progress.step + 1] = sum(squares) ** 0.5 * wanted
        return wanted

    monkeypatch.setattr(Trainer, "_update_is_wanted", watched)
    progress, _, events = run(
        tiny_llama, make_split, max_steps=32, eval_steps=32, on_spike=action, max_grad_norm=None, learning_rate=1e-4
    )
    assert progress.num_spikes == 1
    assert [step for step, event in events if "train.spike_zscore" in event] == [31]
    assert f"train.on_spike: {action}" in caplog.text
    usual = statistics.fmean(norms[step] for step in range(1, 31))
    assert progress.recent[30][1] < 30 * usual  # cut down
    expected = {OnSpike.log: norms[31], OnSpike.clip: usual, OnSpike.skip: 0.0}[action]
    assert norms[31] == pytest.approx(expected, rel=1e-3)
    assert (norms[31] > 100 * usual) is (action is OnSpike.log)
    assert norms[32] > 0


@pytest.mark.parametrize("action", [OnSpike.log, OnSpike.skip])
def test_a_method_learns_nothing_from_a_gradient_that_made_no_update(
    tiny_llama: LlamaForCausalLM, make_split, monkeypatch, action: OnSpike
) -> None:
    model, split = attach_adapter(tiny_llama, compose_config(["lora.r=4"]).lora), make_split(LENGTHS)
    chosen, had_gradient = settings(max_steps=30, eval_steps=30, on_spike=action), []

    class Watching(MethodHooks):
        def after_update(self, step: int) -> None:
            had_gradient.append(any(p.grad is not None for p in model.parameters()))

    zscores = iter([0.0] * 24 + [9.0] + [0.0] * 5)
    monkeypatch.setattr("pipeline.training.highest_zscore", lambda *args: next(zscores))
    Trainer(model, split, split, chosen, 0, lambda *event: None, progress_bar=False, hooks=Watching()).run()
    assert [step for step, had in enumerate(had_gradient, 1) if not had] == ([25] if action is OnSpike.skip else [])


def scale_losses(trainer: Trainer, init_scale: float) -> torch.amp.GradScaler:
    """float16's loss scale on a CPU; accelerate scales on a GPU alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    trainer.accelerator.scaler, trainer.accelerator.native_amp = scaler, True
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    trainer.accelerator._optimizers = [trainer.optimizer]
    return scaler


@pytest.mark.parametrize("action", list(OnSpike))
def test_a_spike_under_a_loss_scale(tiny_llama: LlamaForCausalLM, make_split, monkeypatch, action: OnSpike) -> None:
    model = attach_adapter(tiny_llama, compose_config(["lora.r=4"]).lora)
    split = make_split(LENGTHS)
    half = compose_config(["train.mixed_precision=float16"]).train.mixed_precision
    chosen = settings(max_steps=30, eval_steps=30, on_spike=action, mixed_precision=half)
    trainer = Trainer(model, split, split, chosen, 0, lambda step, event: None, progress_bar=False)
    scale_losses(trainer, 2.0**10)
    zscores = iter([0.0] * 24 + [9.0] + [0.0] * 5)
    monkeypatch.setattr("pipeline.training.highest_zscore", lambda *args: next(zscores))
    progress = trainer.run()
    assert (progress.step, progress.num_spikes) == (30, 1)


def test_a_lasting_change_ends_being_a_spike(tiny_llama: LlamaForCausalLM, make_split, monkeypatch) -> None:
    accumulate = Trainer._accumulate

    def stronger(trainer: Trainer, *args) -> float:
        loss = accumulate(trainer, *args)
        if trainer.progress.step >= 30:
            for parameter in trainer.trainable.values():
                parameter.grad.mul_(5.0)
        return loss

    monkeypatch.setattr(Trainer, "_accumulate", stronger)
    progress, _, events = run(
        tiny_llama, make_split, max_steps=60, eval_steps=60, on_spike=OnSpike.skip, max_grad_norm=None,
        learning_rate=1e-4,
    )  # fmt: skip
    spikes = [step for step, event in events if "train.spike_zscore" in event]
    assert spikes[0] == 31
    assert spikes[-1] < 45


def test_out_of_memory_in_validation_leaves_the_training_as_it_is(
    tiny_llama: LlamaForCausalLM, make_split, monkeypatch, caplog
) -> None:
    whole, weights, _ = run(tiny_llama, make_split, lengths=LONG, micro_batch_size=1)
    forward = LlamaForCausalLM.forward

    def limited(model, *args, **kwargs):
        if not model.training and kwargs["input_ids"].numel() > 46:  # one row at a time
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", limited)
    progress, cut, _ = run(tiny_llama, make_split, lengths=LONG, micro_batch_size=1)
    assert (progress.eval_batch_size, progress.micro_batch_size, progress.gradient_checkpointing) == (1, 1, False)
    assert progress.best_loss == pytest.approx(whole.best_loss, abs=1e-6)
    assert all(torch.equal(cut[name], weights[name]) for name in weights)
    assert "out of memory in validation" in caplog.text


def test_out_of_memory_in_the_optimizer_is_named(tiny_llama: LlamaForCausalLM, make_split, monkeypatch) -> None:
    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(AcceleratedOptimizer, "step", no_room)
    with pytest.raises(TrainingError, match=r"step 1, in the optimizer .*paged_adamw_8bit"):
        run(tiny_llama, make_split)


def test_the_environment_does_not_scale_gradients(tiny_llama: LlamaForCausalLM, make_split, monkeypatch) -> None:
    _, _, events = run(tiny_llama, make_split)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    _, _, again = run(tiny_llama, make_split)
    assert [e.get("train.grad_norm") for _, e in again] == [e.get("train.grad_norm") for _, e in events]


def test_without_a_threshold_no_spike_is_looked_for(tiny_llama: LlamaForCausalLM, make_split, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.training.highest_zscore", lambda *args: 1e9)
    progress, _, _ = run(tiny_llama, make_split, spike_zscore=None)
    assert progress.num_spikes == 0
