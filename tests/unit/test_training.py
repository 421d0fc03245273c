"""The loop: order of rows, accumulation, keeping the best, stopping early, repeatability."""

import copy
import dataclasses

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import LlamaForCausalLM

from pipeline.checkpoints import Checkpoints
from pipeline.config import compose_config
from pipeline.errors import TrainingError
from pipeline.lora import attach_lora
from pipeline.training import Trainer, num_steps, rows_of_step

LENGTHS = [(4, 3), (6, 9), (3, 2), (8, 5), (2, 12), (7, 1), (5, 5), (9, 4)]


def settings(**changes):
    overrides = ["train.max_steps=6", "train.eval_steps=3", "train.micro_batch_size=4", "train.learning_rate=1e-2"]
    return dataclasses.replace(compose_config(overrides).train, **changes)


def run(base: LlamaForCausalLM, make_split, checkpoints: Checkpoints | None = None, **changes):
    torch.manual_seed(0)
    model = attach_lora(copy.deepcopy(base), compose_config(["lora.r=4"]).lora)
    events: list[tuple[int, dict]] = []
    trainer = Trainer(
        model, make_split(LENGTHS), make_split(LENGTHS[:4], seed=5, name="validation"), settings(**changes), 0,
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
    model = attach_lora(tiny_llama, compose_config(["lora.r=4"]).lora)
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
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)  # accelerate scales on a GPU alone
    trainer.accelerator.scaler, trainer.accelerator.native_amp = scaler, True
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    trainer.accelerator._optimizers = [trainer.optimizer]
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
