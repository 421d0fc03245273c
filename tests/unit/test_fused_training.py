"""Adapters trained together are those trained alone; what ends one leaves the others."""

import copy
import dataclasses
import functools
import os
import shutil
import signal
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import pipeline.fused_training
import pipeline.segmented_lora
from pipeline import grouped_lora
from pipeline.checkpoints import Checkpoints
from pipeline.config import compose_config
from pipeline.errors import ConfigError, Interrupted, TrainingError
from pipeline.finetuning import finetune
from pipeline.fused_finetuning import Member, finetune_together
from pipeline.fused_training import Fused, FusedTrainer
from pipeline.lora import attach_adapter
from pipeline.optimizers import freeze_unused
from pipeline.quantized_layers import dequantize, quantize_model
from pipeline.schema import Dtype, RunConfig
from pipeline.segmented_lora import CannotFuse, segmented_lora, share_weights
from pipeline.training import Trainer
from tests.standins import CPU, make_model, write_processed

LENGTHS = [(4, 3), (6, 9), (3, 2), (8, 5), (2, 12), (7, 1), (5, 5), (9, 4)]
STEPS = ["train.max_steps=6", "train.eval_steps=2", "train.micro_batch_size=3", "train.learning_rate=1e-2"]
POINTS = [
    ["lora.r=1", "lora=attention"],
    ["lora.r=2", "lora=mlp", "train.seed=1", "train.learning_rate=2e-3"],
    ["lora.r=8", "lora.target_modules=[q_proj,down_proj]", "lora.lora_alpha=4", "train.lr_scheduler=constant"],
    ["lora.r=32", "train.seed=2", "train.weight_decay=0.1", "train.eval_steps=3"],
]


@functools.cache
def composed(*overrides: str) -> RunConfig:
    return compose_config(list(overrides))


class Losses(dict):
    """What a training tells: validation loss by step."""

    def __call__(self, step: int, event: dict[str, float]) -> None:
        if "validation.loss" in event:
            self[step] = event["validation.loss"]


def make_trainer(model: LlamaForCausalLM, make_split, overrides: list[str], **changes) -> tuple[Trainer, Losses]:
    config = composed(*STEPS, *overrides)
    torch.manual_seed(config.train.seed)
    splits = make_split(LENGTHS), make_split(LENGTHS[:4], seed=5, name="validation")
    losses = Losses()
    settings = dataclasses.replace(config.train, **changes)
    adapted = attach_adapter(model, config.lora)
    freeze_unused(adapted, settings.optimizer)
    return Trainer(adapted, *splits, settings, 0, losses, progress_bar=False), losses


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.trainable.items()}


def train_alone(base, make_split, overrides: list[str], checkpoints: Checkpoints | None = None, **changes):
    trainer, losses = make_trainer(copy.deepcopy(base), make_split, overrides, **changes)
    trainer.run(checkpoints)
    return losses, weights(trainer)


def make_group(base, make_split, points=POINTS, folder: Path | None = None, **changes):
    base.requires_grad_(False)
    made = [make_trainer(share_weights(base), make_split, point, **changes) for point in points]
    members = [Fused(trainer, Checkpoints(folder / str(i), 2, 1) if folder else None)
               for i, (trainer, _) in enumerate(made)]  # fmt: skip
    return FusedTrainer(base, members, progress_bar=False), [losses for _, losses in made]


def train_together(base, make_split, points=POINTS, folder: Path | None = None, **changes):
    group, losses = make_group(base, make_split, points, folder, **changes)
    group.run()
    return group, losses


def assert_same(
    group: FusedTrainer, losses: list[Losses], alone: list[tuple[Losses, dict]], atol: float = 1e-4
) -> None:
    for member, found, (expected, expected_weights) in zip(group.members, losses, alone, strict=True):
        assert member.error is None
        assert found == pytest.approx(expected, abs=atol)
        assert len(expected) > 2
        assert abs(expected[0] - expected[max(expected)]) > 10 * atol  # it moved, or the tolerance would say nothing
        for name, tensor in weights(member.trainer).items():
            torch.testing.assert_close(tensor, expected_weights[name], rtol=0, atol=1e-3)


@pytest.fixture
def nf4(tiny_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    quantize_model(tiny_llama, compose_config(["quantization.compute_dtype=float32"]).quantization, CPU)
    return tiny_llama


@pytest.mark.parametrize("folds", [True, False])
def test_patterns_lora_plus_and_lora_fa_are_each_adapters_own(tiny_llama, make_split, monkeypatch, folds: bool) -> None:
    if not folds:
        monkeypatch.setattr("pipeline.fused_lora.LARGEST_FOLDED", 0)
    points = [
        ["lora.r=2", "+lora.rank_pattern={down_proj: 6}", "+lora.alpha_pattern={q_proj: 20}"],
        ["lora.r=4", "train.lora_plus_ratio=4", "train.learning_rate=3e-3"],
    ]
    frozen = [["lora.r=4", "train.optimizer=lora_fa"], ["lora.r=2", "train.optimizer=lora_fa", "lora=attention"]]
    for pair in (points, frozen):
        alone = [train_alone(tiny_llama, make_split, point) for point in pair]
        assert_same(*train_together(copy.deepcopy(tiny_llama), make_split, pair), alone)


@pytest.mark.parametrize("kind", ["plain", "delta", "kept", "dequantised", "padded", "accumulated"])
def test_each_adapter_is_the_one_trained_alone(tiny_llama, make_split, monkeypatch, request, kind: str) -> None:
    base, changes = tiny_llama, {}
    if kind in ("kept", "dequantised"):
        base = request.getfixturevalue("nf4")
        if kind == "dequantised":
            dequantize(base, torch.float32)
    if kind == "delta":
        monkeypatch.setattr("pipeline.fused_lora.LARGEST_FOLDED", 0)
    if kind == "padded":
        base.set_attn_implementation("eager")
    if kind == "accumulated":
        changes = {"micro_batch_size": 1, "gradient_accumulation_steps": 3}
    alone = [train_alone(base, make_split, point, **changes) for point in POINTS]
    assert_same(*train_together(base, make_split, **changes), alone)


def test_in_one_product_for_all_adapters_each_is_the_one_trained_alone(tiny_llama, make_split, monkeypatch) -> None:
    """As on a GPU that has such a kernel; in bfloat16, whose rounding a large epsilon keeps Adam from blowing up."""
    taken, takes, base = [], grouped_lora.takes, tiny_llama.bfloat16()
    points = [["lora.r=12", "lora=attention"], ["lora.r=8", "lora=mlp"], POINTS[2], ["lora.r=16", "train.seed=2"]]
    changes = {"mixed_precision": Dtype.bfloat16, "adam_epsilon": 1.0, "learning_rate": 1.0}
    monkeypatch.setattr(grouped_lora, "is_to_be_used", lambda device: True)
    monkeypatch.setattr(grouped_lora, "takes", lambda *tensors: taken.append(takes(*tensors)) or taken[-1])
    alone = [train_alone(base, make_split, point, **changes)[0] for point in points]
    group, losses = train_together(base, make_split, points, **changes)
    assert set(taken) == {True}
    for member, found, expected in zip(group.members, losses, alone, strict=True):
        assert member.error is None
        assert found == pytest.approx(expected, abs=0.015)
        assert abs(expected[0] - expected[max(expected)]) > 0.045


@pytest.mark.parametrize("checks", [True, False])
def test_swapped_scalings_are_caught(tiny_llama, make_split, monkeypatch, checks: bool) -> None:
    own = pipeline.segmented_lora._adapters

    def swapped(models):
        found = own(models)
        for path, (first, second, *others) in found.items():
            if first and second:
                found[path] = [(*first[:2], second[2]), (*second[:2], first[2]), *others]
        return found

    points = [["lora.lora_alpha=4"], ["lora.lora_alpha=6"]]
    alone = [train_alone(tiny_llama, make_split, point) for point in points]
    monkeypatch.setattr(pipeline.segmented_lora, "_adapters", swapped)
    if checks:
        with pytest.raises(CannotFuse, match="computes otherwise than alone"):
            train_together(tiny_llama, make_split, points)
        return
    monkeypatch.setattr(FusedTrainer, "_check_forward", lambda group: None)
    with pytest.raises(AssertionError):
        assert_same(*train_together(tiny_llama, make_split, points), alone)


def test_one_without_an_end_leaves_the_others_alone(tiny_llama, make_split, caplog) -> None:
    points = [POINTS[0], ["train.learning_rate=1e30", "train.max_grad_norm=null"], POINTS[3]]
    group, losses = train_together(tiny_llama, make_split, points)
    error = group.members[1].error
    assert isinstance(error, TrainingError)
    assert "validation loss is nan" in str(error) or "Rows of the batch" in str(error)
    assert "an adapter leaves the group after step" in caplog.text
    del group.members[1], losses[1]
    assert_same(group, losses, [train_alone(tiny_llama, make_split, point) for point in (POINTS[0], POINTS[3])])


def test_what_on_event_raises_ends_its_own_training(tiny_llama, make_split) -> None:
    group, losses = make_group(tiny_llama, make_split, POINTS[:2])

    def prune(step: int, event: dict[str, float]) -> None:
        if step == 4:
            raise TrainingError("pruned")

    group.members[0].trainer.on_event = prune
    group.run()
    assert str(group.members[0].error) == "pruned"
    assert max(losses[1]) == 6


def test_one_stops_early_and_keeps_its_best(tiny_llama, make_split) -> None:
    early = ["train.learning_rate=0.3", "train.early_stopping_patience=1", "train.max_grad_norm=null"]
    changes = {"max_steps": 20, "eval_steps": 1}
    expected, expected_weights = train_alone(tiny_llama, make_split, early, **changes)
    group, (found, other) = train_together(tiny_llama, make_split, [early, POINTS[1]], **changes)
    assert max(found) == max(expected) < 20 == max(other)
    assert min(found.values()) == pytest.approx(min(expected.values()), abs=1e-4)
    for name, tensor in weights(group.members[0].trainer).items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("regrouped", [True, False])
def test_a_stopped_group_goes_on_in_any_grouping(
    tiny_llama, make_split, tmp_path, monkeypatch, regrouped: bool
) -> None:
    alone = [train_alone(tiny_llama, make_split, point) for point in POINTS]
    group, _ = make_group(tiny_llama, make_split, folder=tmp_path / "c")
    take_round = FusedTrainer._take_round
    killed_at = 3

    def stop_at_3(group: FusedTrainer, live) -> None:
        take_round(group, live)
        if group.members[0].trainer.progress.step == killed_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(FusedTrainer, "_take_round", stop_at_3)
    with pytest.raises(Interrupted, match="SIGTERM"):
        group.run()
    monkeypatch.setattr(FusedTrainer, "_take_round", take_round)
    for i in range(4):
        assert (tmp_path / "c" / str(i) / "checkpoint-00000003").exists()
    if not regrouped:
        found, found_weights = train_alone(tiny_llama, make_split, POINTS[3], Checkpoints(tmp_path / "c" / "3", 2, 1))
        assert found == pytest.approx(alone[3][0], abs=1e-4)
        return
    shutil.move(tmp_path / "c" / "3", tmp_path / "d" / "0")  # one goes on from step 3 beside one from its start
    group, losses = train_together(tiny_llama, make_split, [POINTS[3], POINTS[1]], tmp_path / "d")
    assert_same(group, losses, [alone[3], alone[1]])
    group, losses = train_together(tiny_llama, make_split, POINTS[:3], tmp_path / "c")
    assert_same(group, losses, alone[:3])
    assert all(member.trainer.progress.step == 6 for member in group.members)


def test_a_checkpoint_of_a_training_alone_goes_on_in_a_group(tiny_llama, make_split, tmp_path) -> None:
    alone = [train_alone(tiny_llama, make_split, point) for point in POINTS[:2]]
    train_alone(tiny_llama, make_split, POINTS[0], Checkpoints(tmp_path / "0", 4, 1))
    group, losses = train_together(tiny_llama, make_split, POINTS[:2], tmp_path)
    assert group.members[0].trainer.progress.losses[:4] == pytest.approx(
        make_history(tiny_llama, make_split, POINTS[0])[:4], abs=0
    )
    assert_same(group, losses, alone)


def make_history(base, make_split, point: list[str]) -> list[float]:
    trainer, _ = make_trainer(copy.deepcopy(base), make_split, point)
    return trainer.run().losses


@pytest.mark.parametrize(("tokens", "adapters", "rows"), [(150, 2, 3), (60, 1, 3), (30, 1, 2)])
def test_a_group_that_does_not_fit_is_split(
    tiny_llama, make_split, monkeypatch, caplog, tokens, adapters, rows
) -> None:
    whole = [train_alone(tiny_llama, make_split, point) for point in POINTS]
    forward = LlamaForCausalLM.forward

    def limited(model, *args, **kwargs):
        if kwargs["input_ids"].numel() > (tokens if model.training else 2 * tokens):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", limited)
    group, losses = train_together(tiny_llama, make_split)
    assert group.members_a_forward == adapters
    assert {member.trainer.progress.micro_batch_size for member in group.members} == {rows}
    assert "out of memory" in caplog.text
    assert_same(group, losses, whole)


@pytest.mark.parametrize("at_once", [1, 3, 4])
def test_how_many_are_measured_at_once_changes_nothing(tiny_llama, make_split, monkeypatch, at_once: int) -> None:
    monkeypatch.setattr(pipeline.fused_training, "CACHED_TOKENS", at_once * 60)  # 6 rows of 10 tokens for each
    group, losses = make_group(tiny_llama, make_split)
    measured: list[int] = []
    own = FusedTrainer._measure_together
    monkeypatch.setattr(FusedTrainer, "_measure_together", lambda g, m: (measured.append(len(m)), own(g, m))[1])
    group.run()
    assert max(measured) == at_once
    assert measured[0] == 1  # fresh adapters are the base: measured once for all
    assert len({found[0] for found in losses}) == 1
    assert_same(group, losses, [train_alone(tiny_llama, make_split, point) for point in POINTS])


def test_shared_weights_are_the_same_memory(nf4) -> None:
    shared = share_weights(nf4)
    pairs = list(zip(nf4.parameters(), shared.parameters(), strict=True))
    assert pairs
    assert all(mine is theirs for mine, theirs in pairs)
    assert not {id(module) for module in nf4.modules()} & {id(module) for module in shared.modules()}


def test_more_than_plain_lora_does_not_fuse(tiny_llama) -> None:
    model = attach_adapter(share_weights(tiny_llama), compose_config(["lora.use_dora=true"]).lora)
    with pytest.raises(CannotFuse, match="more than plain LoRA"), segmented_lora(tiny_llama, [model]):
        pass
    assert not any("forward" in vars(module) for module in tiny_llama.modules())


def members(folder: Path, points: list[list[str]], base: Path) -> list[Member]:
    common = [
        "train=lora",
        f"model.path={base}",
        "quantization=none",
        *STEPS,
        "runtime.progress=false",
        "train.keep=last",
    ]
    return [
        Member(
            composed(*common, *point),
            folder / f"adapter{i}",
            Checkpoints(folder / f"c{i}", 100, 1),
            lambda step, event: None,
        )
        for i, point in enumerate(points)
    ]


def test_finetunes_together_are_those_alone_and_load_in_peft(tmp_path) -> None:
    make_model(tmp_path / "base")
    processed = write_processed(tmp_path / "processed")
    points = [POINTS[0], ["lora.r=99"], POINTS[3]]
    group = members(tmp_path / "together", points, tmp_path / "base")
    first, too_wide, last = finetune_together(group, processed, tmp_path / "quantized", CPU)
    assert isinstance(too_wide, ConfigError)
    for found, member, alone in zip(
        (first, last), (group[0], group[2]), members(tmp_path / "alone", [points[0], points[2]], tmp_path / "base"),
        strict=True,
    ):  # fmt: skip
        assert isinstance(found, tuple)
        arguments = alone.adapter_folder, alone.checkpoints, CPU, alone.on_event
        metrics, history = finetune(alone.config, processed, tmp_path / "quantized", *arguments)
        assert found[0].keys() == metrics.keys() | {"fused_with"}
        assert found[0]["fused_with"] == 1
        assert found[0]["trainable_parameters"] == metrics["trainable_parameters"]
        assert [event.keys() for event in found[1]] == [event.keys() for event in history]
        assert found[0]["validation_loss"] == pytest.approx(metrics["validation_loss"], abs=1e-4)
        logits = []
        for folder in (member.adapter_folder, alone.adapter_folder):
            base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
            model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
            with torch.no_grad():
                logits.append(model(torch.arange(3, 23)[None]).logits)
        torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-2)
        config = "adapter_config.json"
        assert (member.adapter_folder / config).read_bytes() == (alone.adapter_folder / config).read_bytes()


def test_what_cannot_fuse_trains_one_after_another(tmp_path, monkeypatch, caplog) -> None:
    make_model(tmp_path / "base")
    processed = write_processed(tmp_path / "processed")

    def refuse(group: FusedTrainer) -> None:
        raise CannotFuse("a layer gets 3 tokens of a batch of 4")

    monkeypatch.setattr(FusedTrainer, "_check_forward", refuse)
    group = members(tmp_path, POINTS[:2], tmp_path / "base")
    found = finetune_together(group, processed, tmp_path / "quantized", CPU)
    assert [metrics["fused_with"] for metrics, _ in found] == [0, 0]
    assert "2 adapters are trained one after another, not together: a layer gets 3 tokens" in caplog.text


def test_points_that_do_not_go_together_are_refused(tmp_path) -> None:
    for points, said in (
        ([POINTS[0], ["train.micro_batch_size=2"]], "differ in more"),
        ([POINTS[0], ["lora.lora_dropout=0.1"]], "trains only alone"),
    ):
        with pytest.raises(ConfigError, match=said):
            finetune_together(members(tmp_path, points, tmp_path), tmp_path, tmp_path, CPU)
