"""The check before a base is loaded, and the memory of devices and containers."""

import logging
import time

import pytest
import torch

from pipeline import device_memory, fit, fit_check, plan_columns
from pipeline.config import compose_config
from pipeline.dataset import Example, write_split
from pipeline.device_memory import measure_peak_from_here, peak_memory_bytes, planned_and_measured
from pipeline.errors import ConfigError, ModelError
from pipeline.imports import imported_files
from pipeline.memory import Memory
from pipeline.plan_columns import rows_a_process
from tests.small_project import watch_loads

MEGABYTES = 1_000_000


@pytest.fixture
def has(monkeypatch):
    """Sets the memory of every device, and how much of it is free."""

    def set_memory(total, free=None):
        monkeypatch.setattr(fit_check, "total_bytes", lambda device: total)
        monkeypatch.setattr(fit_check, "free_bytes", lambda device: total if free is None else free)

    return set_memory


@pytest.fixture
def processed(tmp_path):
    """Rows of 320 tokens, as many as `data.max_length` allows."""
    for name in ("train", "validation"):
        rows = [Example(f"r{i}", [1] * 320, [1] * 320, 2, "", ["a"]) for i in range(32)]
        write_split(tmp_path / f"{name}.arrow", rows)
    return tmp_path


def test_the_embedded_default_fits_quickly_and_reads_no_weights(monkeypatch, caplog):
    loads = watch_loads(monkeypatch)
    fit.check_fit(compose_config(["runtime.device=cpu"]))
    started = time.process_time()
    fit.check_fit(compose_config(["runtime.device=cpu"]))
    assert time.process_time() - started < 1.5
    assert not loads
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_cannot_fit_stops_with_what_would(has):
    has(3 * MEGABYTES)
    with pytest.raises(ConfigError) as stopped:
        fit.check_fit(compose_config(["runtime.device=cpu", "train=full", "quantization=none"]))
    message = str(stopped.value)
    for part in ("cannot fit", "0.00 GB for it", "What would fit", "a card of 16 GB", "runtime.on_misfit=warn"):
        assert part in message
    has(10_000 * MEGABYTES)
    fit.check_fit(compose_config(["runtime.device=cpu", "train=full", "quantization=none"]))


@pytest.fixture
def made_up(monkeypatch):
    """A plan in no time: a gigabyte, and a megabyte a token."""

    def plan_memory(architecture, setup):
        return Memory(1_000 * MEGABYTES, 0, 0, 0, 0, setup.micro_batch_size * setup.length * MEGABYTES, 0, 0, 0)

    for module in (fit_check, plan_columns):
        monkeypatch.setattr(module, "plan_memory", plan_memory)


def test_warn_and_ignore(has, made_up, caplog):
    has(3 * MEGABYTES)
    fit.check_fit(compose_config(["runtime.device=cpu", "runtime.on_misfit=warn"]))
    assert "cannot fit" in caplog.text
    caplog.clear()
    fit.check_fit(compose_config(["runtime.device=cpu", "runtime.on_misfit=ignore"]))
    assert not caplog.text


def test_a_micro_batch_that_is_too_large_is_a_warning(has, made_up, caplog):
    has((1_000 + 5 * 320) * MEGABYTES)
    fit.check_fit(compose_config(["runtime.device=cpu"]))
    assert "train.micro_batch_size=16" in caplog.text
    assert "set train.micro_batch_size=4 train.gradient_accumulation_steps=4" in caplog.text  # halved: 16, 8, 4


@pytest.fixture
def gpus(monkeypatch, has):
    """Plans for CUDA without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    return has


def test_before_training_another_machine_may_be_meant(has, made_up, processed, caplog):
    has(2_000 * MEGABYTES)
    config = compose_config(["runtime.device=auto"])
    fit.check_fit(config)
    assert "micro_batch_size" in caplog.text
    caplog.clear()
    has(1_000 * MEGABYTES)
    fit.check_fit(config)
    assert "cannot fit" in caplog.text
    assert "may not be the one that trains" in caplog.text
    with pytest.raises(ConfigError, match="cannot fit"):
        fit.check_fit(compose_config(["runtime.device=cpu"]))  # this device is meant
    with pytest.raises(ConfigError, match="cannot fit"):
        fit.check_fit(config, processed)  # here it trains


def test_what_is_free_counts_where_it_trains_alone(has, made_up, processed):
    config = compose_config(["runtime.device=cpu"])
    has(100_000 * MEGABYTES, 1_000 * MEGABYTES)
    fit.check_fit(config)
    with pytest.raises(ConfigError, match=r"1\.00 GB free for it"):
        fit.check_fit(config, processed)
    has(100_000 * MEGABYTES)
    fit.check_fit(config, processed)


def test_several_processes_take_no_smaller_micro_batches_by_themselves(gpus, made_up, processed, caplog):
    """Alone 16 rows are halved until they fit; of two processes each has 8 to begin with, and stops."""
    gpus((1_000 + 3 * 320) * MEGABYTES)
    alone = compose_config(["runtime.device=cuda"])
    fit.check_fit(alone, processed)
    assert "micro-batches of 2 will be used" in caplog.text
    two = ["runtime.device=cuda", "runtime.num_processes=2"]
    with pytest.raises(ConfigError) as stopped:
        fit.check_fit(compose_config(two), processed)
    assert "8 rows of 320 tokens at a time in each process" in str(stopped.value)
    assert "train.micro_batch_size=2 train.gradient_accumulation_steps=8" in str(stopped.value)
    fit.check_fit(compose_config([*two, "train.micro_batch_size=2", "train.gradient_accumulation_steps=8"]), processed)
    gpus((1_000 + 9 * 320) * MEGABYTES)
    fit.check_fit(compose_config(two), processed)  # 8 rows, not 16


def test_the_fullest_micro_batch_is_of_one_process(processed):
    for num_processes in (1, 3):
        config = compose_config([f"runtime.num_processes={num_processes}"])
        assert fit_check.fullest_length(config, processed) == 320
        assert rows_a_process(config) == {1: 16, 3: 6}[num_processes]


@pytest.mark.parametrize("error", [StopIteration(), AttributeError("no layers"), KeyError("kind"), ModelError("odd")])
def test_a_plan_that_fails_stops_nothing(monkeypatch, has, processed, caplog, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(fit_check, "plan_memory", fail)
    has(10**12)
    config = compose_config(["runtime.device=cpu"])
    fit.check_fit(config, processed)
    assert "not planned, so not checked" in caplog.text
    assert fit.planned_bytes(config, processed) is None
    assert fit.planned_bytes(config, processed / "nowhere") is None
    assert caplog.text.count("no planned memory") == 2


def test_a_setting_that_the_model_does_not_have_is_still_an_error(processed):
    with pytest.raises(ConfigError, match="c_attn"):
        fit.check_fit(compose_config(["runtime.device=cpu", "lora.target_modules=[c_attn]"]), processed)


def test_a_process_with_no_gpu_of_its_own(monkeypatch):
    """`select_device` says that there are too few; what is free on the last one is asked for."""
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: asked.append(gpu) or (60, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: 20)
    for rank in ("0", "1", "5"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert (device_memory.free_bytes("cuda"), device_memory.total_bytes("cuda")) == (70, 100)
    assert asked == [0, 0, 1, 1, 1, 1]


def test_processes_of_one_machine_share_its_memory(has):
    has(100)
    runtime = compose_config(["runtime.num_processes=4", "runtime.num_machines=1"]).runtime
    assert fit_check.capacity_bytes(runtime, "cpu") == 25
    assert fit_check.capacity_bytes(runtime, "cuda") == 100


def test_a_base_that_cannot_be_held_while_it_is_quantised(monkeypatch, has):
    """QLoRA's own memory is made up as nothing; the base has to be held whole all the same."""
    nothing = Memory(0, 0, 0, 0, 0, 0, 0, 0, 0)
    monkeypatch.setattr(fit_check, "plan_memory", lambda architecture, setup: nothing)
    has(MEGABYTES)
    with pytest.raises(ConfigError, match=r"takes 0\.00 GB in float32 while it is quantised"):
        fit.check_fit(compose_config(["runtime.device=cpu"]))
    fit.check_fit(compose_config(["runtime.device=cpu", "train=lora", "quantization=none"]))


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
    assert device_memory.total_bytes("cpu") == 5000
    (group.parent / "memory.max").write_text("max")
    assert device_memory.free_bytes("cpu") == pytest.approx(unlimited, rel=0.2)


def test_planned_beside_measured():
    metrics = {"planned_memory_bytes": 1.1e9, "peak_memory_bytes": 1.5e9, "baseline_memory_bytes": 0.5e9}
    assert planned_and_measured(metrics).startswith("planned 1.10 GB (+10 %), measured 1.00 GB above the 0.50 GB")


def test_the_peak_is_of_what_comes_after_the_measurement_began() -> None:
    """Not of the process's life: a worker of a sweep trains several points."""
    device = torch.device("cpu")
    measure_peak_from_here(device)
    large = torch.ones(100 * 2**20)  # 400 MiB
    del large
    whole = peak_memory_bytes(device)
    baseline = measure_peak_from_here(device)
    small = torch.ones(10 * 2**20)
    assert whole - baseline > 300 * 2**20
    assert 30 * 2**20 < peak_memory_bytes(device) - baseline < 100 * 2**20
    del small
