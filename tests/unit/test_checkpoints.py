"""Atomic checkpoints, and a resumed training that is the same training."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import LlamaForCausalLM

from pipeline.checkpoints import Checkpoint, Checkpoints
from pipeline.errors import TrainingError
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


@pytest.mark.parametrize(
    "changes",
    [{}, {"early_stopping_patience": 2, "learning_rate": 0.3, "eval_steps": 1}, {"gradient_accumulation_steps": 2}],
)
def test_resumed_at_any_step_is_the_same_training(
    tiny_llama: LlamaForCausalLM, make_split, tmp_path: Path, changes: dict
) -> None:
    every = Checkpoints(tmp_path / "every", every_steps=1, num_kept=100)
    whole, weights, _ = run(tiny_llama, make_split, every, **changes)
    for folder in sorted((tmp_path / "every").iterdir()):
        one = tmp_path / folder.name
        shutil.copytree(folder, one / folder.name)
        resumed, again, events = run(tiny_llama, make_split, Checkpoints(one, 1000, 1), **changes)
        assert all(torch.equal(weights[name], again[name]) for name in weights), folder.name
        assert resumed.history == whole.history
        assert [{"step": step, **event} for step, event in events] == whole.history


def test_a_resume_that_forgets_the_optimizer_would_be_seen(
    tiny_llama: LlamaForCausalLM, make_split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weights, _ = run(tiny_llama, make_split, Checkpoints(tmp_path / "c", every_steps=3, num_kept=9))
    shutil.rmtree(tmp_path / "c" / "checkpoint-00000006")
    monkeypatch.setattr("accelerate.optimizer.AcceleratedOptimizer.load_state_dict", lambda self, state: None)
    _, other, _ = run(tiny_llama, make_split, Checkpoints(tmp_path / "c", 1000, 9))
    assert any(not torch.equal(weights[name], other[name]) for name in weights)
