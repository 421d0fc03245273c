"""Atomic checkpoints, and a resumed training that is the same training."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError
from transformers import LlamaForCausalLM

from pipeline.checkpoints import FILES, MARKER, Checkpoint, Checkpoints
from pipeline.errors import TrainingError
from pipeline.schema import Dtype
from pipeline.training import Trainer
from tests.unit.test_store import watch_fsync
from tests.unit.test_training import run


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"w": torch.full((3,), float(step))}, {"rng": torch.get_rng_state()}, {"step": step})


def test_the_newest_is_read_and_the_number_kept_is_bounded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", every_steps=2, num_kept=2)
    assert checkpoints.latest() is None
    for step in (2, 4, 10):
        checkpoints.save(checkpoint(step))
    newest = checkpoints.latest()
    assert newest is not None
    assert newest.step == newest.numbers["step"] == 10
    assert torch.equal(newest.tensors["w"], torch.full((3,), 10.0))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["checkpoint-00000004", "checkpoint-00000010"]
    assert [checkpoints.due(step) for step in (1, 2, 3, 4)] == [False, True, False, True]


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.pt", "state.json", "complete.json"])
@pytest.mark.parametrize("how", ["torn", "missing", "altered"])
def test_a_torn_or_altered_one_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, how: str
) -> None:
    checkpoints = Checkpoints(tmp_path / "c", every_steps=1, num_kept=5)
    for step in (1, 2):
        checkpoints.save(checkpoint(step))
    path = tmp_path / "c" / "checkpoint-00000002" / file
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if how == "torn" else content[:-1] + bytes([content[-1] ^ 1]))
    newest = checkpoints.latest()
    if (file, how) == ("complete.json", "altered"):  # its last byte is a newline: still the same JSON or none
        assert newest is not None
        return
    assert newest is not None
    assert newest.step == 1
    assert "checkpoint-00000002" in caplog.text


def test_torn_ones_of_later_steps_do_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    for step in (6, 8, 10):
        Checkpoints(tmp_path / "c", every_steps=1, num_kept=3).save(checkpoint(step))
    for step in (8, 10):
        (tmp_path / "c" / f"checkpoint-{step:08d}" / MARKER).unlink()
    checkpoints = Checkpoints(tmp_path / "c", every_steps=1, num_kept=2)
    checkpoints.save(checkpoint(7))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["checkpoint-00000006", "checkpoint-00000007"]
    newest = checkpoints.latest()
    assert newest is not None
    assert newest.step == 7


def test_what_a_killed_writer_left_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    leftover = tmp_path / "c" / f".unfinished-{os.getpid() + 1}"
    leftover.mkdir(parents=True)
    (leftover / "tensors.safetensors").write_bytes(b"torn")
    checkpoints = Checkpoints(tmp_path / "c", every_steps=1, num_kept=2)
    assert checkpoints.latest() is None
    checkpoints.save(checkpoint(1))
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["checkpoint-00000001"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = watch_fsync(monkeypatch)
    Checkpoints(tmp_path / "c", every_steps=1, num_kept=2).save(checkpoint(1))
    unfinished = f"c/.unfinished-{os.getpid()}"
    names = [path.relative_to(tmp_path).as_posix() for path in flushed]
    assert {f"{unfinished}/{name}" for name in (*FILES, MARKER)} <= set(names)
    assert names[-2:] == [unfinished, "c"]


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("torch.save", OSError(28, "No space left on device")),
        ("pipeline.checkpoints.save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
    ],
)
def test_a_full_disk_leaves_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    checkpoints = Checkpoints(tmp_path / "c", every_steps=1, num_kept=1)
    checkpoints.save(checkpoint(1))

    def full_disk(*args: object) -> None:
        raise error

    monkeypatch.setattr(where, full_disk)
    with pytest.raises(TrainingError, match="the disk is full: the checkpoint of step 2 was not written"):
        checkpoints.save(checkpoint(2))
    newest = checkpoints.latest()
    assert newest is not None
    assert newest.step == 1
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["checkpoint-00000001"]


def scale_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings have a float16 scaler, whose scale changes every step; accelerate makes one on a GPU alone."""
    make = Trainer.__init__

    def with_scaler(trainer: Trainer, *args, **kwargs) -> None:
        make(trainer, *args, **kwargs)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=1)
        trainer.accelerator.scaler, trainer.accelerator.native_amp = scaler, True
        trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
        trainer.accelerator._optimizers = [trainer.optimizer]

    monkeypatch.setattr(Trainer, "__init__", with_scaler)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"early_stopping_patience": 2, "learning_rate": 0.3, "eval_steps": 1},
        {"gradient_accumulation_steps": 2, "dropout": 0.2},
        {"mixed_precision": Dtype.float16},
    ],
)
def test_resumed_at_any_step_is_the_same_training(
    tiny_llama: LlamaForCausalLM, make_split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    if "mixed_precision" in changes:
        scale_on_the_cpu(monkeypatch)
    every = Checkpoints(tmp_path / "every", every_steps=1, num_kept=100)
    whole, weights, _ = run(tiny_llama, make_split, every, **changes)
    for folder in sorted((tmp_path / "every").iterdir()):
        one = tmp_path / folder.name
        shutil.copytree(folder, one / folder.name)
        resumed, again, events = run(tiny_llama, make_split, Checkpoints(one, 1000, 1), **changes)
        assert all(torch.equal(weights[name], again[name]) for name in weights), folder.name
        assert resumed.history == whole.history
        assert [{"step": step, **event} for step, event in events] == whole.history


@pytest.mark.parametrize(
    ("forgotten", "changes"),
    [
        ("accelerate.optimizer.AcceleratedOptimizer.load_state_dict", {}),
        ("torch.amp.GradScaler.load_state_dict", {"mixed_precision": Dtype.float16}),
        ("pipeline.training.set_rng_state", {"dropout": 0.2}),
    ],
    ids=["optimizer", "scaler", "random numbers"],
)
def test_a_resume_that_forgets_something_would_be_seen(
    tiny_llama: LlamaForCausalLM,
    make_split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forgotten: str,
    changes: dict,
) -> None:
    if "mixed_precision" in changes:
        scale_on_the_cpu(monkeypatch)
    whole, weights, _ = run(tiny_llama, make_split, Checkpoints(tmp_path / "c", every_steps=3, num_kept=9), **changes)
    shutil.rmtree(tmp_path / "c" / "checkpoint-00000006")
    monkeypatch.setattr(forgotten, lambda *args: None)
    other, again, _ = run(tiny_llama, make_split, Checkpoints(tmp_path / "c", 1000, 9), **changes)
    assert any(not torch.equal(weights[name], again[name]) for name in weights)
    assert other.history != whole.history
