"""The check before a base is loaded, and the memory of devices and containers."""

import logging
import time

import pytest
import torch

from pipeline import device_memory, fit, fit_check, plan_columns, row_attention
from pipeline.config import compose_config
from pipeline.device_memory import planned_and_measured
from pipeline.errors import ConfigError
from pipeline.imports import imported_files
from pipeline.memory import Memory
from tests.small_project import watch_loads

MEGABYTES = 1_000_000


@pytest.fixture
def has_free(monkeypatch):
    def set_free(num_bytes):
        monkeypatch.setattr(fit_check, "free_bytes", lambda device: num_bytes)

    return set_free


def test_the_embedded_default_fits_quickly_and_reads_no_weights(monkeypatch, caplog):
    loads = watch_loads(monkeypatch)
    fit.check_fit(compose_config(["runtime.device=cpu"]))
    started = time.process_time()
    fit.check_fit(compose_config(["runtime.device=cpu"]))
    assert time.process_time() - started < 1.5
    assert not loads
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_cannot_fit_stops_with_what_would(has_free):
    has_free(3 * MEGABYTES)
    with pytest.raises(ConfigError) as stopped:
        fit.check_fit(compose_config(["runtime.device=cpu", "train=full", "quantization=none"]))
    message = str(stopped.value)
    for part in ("cannot fit", "0.00 GB free", "What would fit", "a card of 16 GB", "runtime.on_misfit=warn"):
        assert part in message
    has_free(10_000 * MEGABYTES)
    fit.check_fit(compose_config(["runtime.device=cpu", "train=full", "quantization=none"]))


@pytest.fixture
def made_up(monkeypatch):
    """A plan in no time: a gigabyte, and a megabyte a token."""

    def plan_memory(architecture, setup):
        return Memory(1_000 * MEGABYTES, 0, 0, 0, 0, setup.micro_batch_size * setup.length * MEGABYTES, 0, 0, 0)

    for module in (fit_check, plan_columns):
        monkeypatch.setattr(module, "plan_memory", plan_memory)


def test_warn_and_ignore(has_free, made_up, caplog):
    has_free(3 * MEGABYTES)
    fit.check_fit(compose_config(["runtime.device=cpu", "runtime.on_misfit=warn"]))
    assert "cannot fit" in caplog.text
    caplog.clear()
    fit.check_fit(compose_config(["runtime.device=cpu", "runtime.on_misfit=ignore"]))
    assert not caplog.text


def test_a_micro_batch_that_is_too_large_is_a_warning(has_free, made_up, caplog):
    has_free((1_000 + 5 * 320) * MEGABYTES)
    fit.check_fit(compose_config(["runtime.device=cpu"]))
    assert "train.micro_batch_size=16" in caplog.text
    assert "set train.micro_batch_size=4 train.gradient_accumulation_steps=4" in caplog.text  # halved: 16, 8, 4


def test_processes_of_one_machine_share_its_memory(has_free):
    has_free(100)
    runtime = compose_config(["runtime.num_processes=4", "runtime.num_machines=1"]).runtime
    assert fit_check.capacity_bytes(runtime, "cpu") == 25
    assert fit_check.capacity_bytes(runtime, "cuda") == 100


def test_a_base_that_cannot_be_held_while_it_is_quantised(monkeypatch, has_free):
    """QLoRA's own memory is made up as nothing; the base has to be held whole all the same."""
    nothing = Memory(0, 0, 0, 0, 0, 0, 0, 0, 0)
    monkeypatch.setattr(fit_check, "plan_memory", lambda architecture, setup: nothing)
    has_free(MEGABYTES)
    with pytest.raises(ConfigError, match=r"takes 0\.00 GB in float32 while it is quantised"):
        fit.check_fit(compose_config(["runtime.device=cpu"]))
    fit.check_fit(compose_config(["runtime.device=cpu", "train=lora", "quantization=none"]))


def test_a_plan_leaves_nothing_behind_in_the_engine():
    """Attention's masks are remembered by length: a training after a plan must not get one without memory."""
    fit.check_fit(compose_config(["runtime.device=cpu", "data.max_length=64"]))
    heads = torch.ones(4, 64, 32, requires_grad=True)
    row_attention.row_attention(heads, heads, heads, 1.0).sum().backward()
    assert type(heads.grad) is torch.Tensor
    assert torch.isfinite(heads.grad).all()


def test_a_better_plan_rebuilds_nothing():
    for stage in ("prepare", "quantize", "train"):
        files = {path.as_posix() for path in imported_files(f"stages.{stage}")}
        assert "pipeline/fit.py" in files
        assert not files & {"pipeline/fit_check.py", "pipeline/memory.py", "pipeline/architecture.py"}


def test_limits_of_containers(tmp_path, monkeypatch):
    group = tmp_path / "jobs/one"
    group.mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("0::/jobs/one\n")
    monkeypatch.setattr(device_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(device_memory, "OWN_CGROUPS", own)
    unlimited = device_memory.free_bytes("cpu")
    for folder, limit, used in ((group, "max", 10), (group.parent, "5000", 3000)):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(used))
        (folder / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    assert device_memory.free_bytes("cpu") == 5000 - 3000 + 500
    (group.parent / "memory.max").write_text("max")
    assert device_memory.free_bytes("cpu") == pytest.approx(unlimited, rel=0.2)


def test_planned_beside_measured():
    metrics = {"planned_memory_bytes": 1.1e9, "peak_memory_bytes": 1.5e9, "baseline_memory_bytes": 0.5e9}
    assert planned_and_measured(metrics).startswith("planned 1.10 GB (+10 %), measured 1.00 GB above the 0.50 GB")
