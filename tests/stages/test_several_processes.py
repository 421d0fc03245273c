"""The train stage in two processes (gloo on the CPU): the same training as in one, and nothing lost when one is killed."""

import json
import os
import re
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from pipeline.files import hash_path
from tests.conftest import Project, copy_project
from tests.stages.test_dvc import make_small

TRAIN = "python -m stages.train train.eval_steps=4 runtime.system_metrics=false runtime.progress=false"
TOLERANCE = 1e-5
SECONDS = 120
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed; an extra: pip install -e '.[deepspeed]'"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = copy_project(tmp_path_factory.mktemp("several"))
    make_small(project)
    project.run("dvc repro quantize")
    return project


UNEVEN = "train.micro_batch_size=3 train.gradient_accumulation_steps=3"  # 9 rows a step: two have to cut them otherwise
EVEN = "train.micro_batch_size=4 train.gradient_accumulation_steps=2"


@pytest.fixture(scope="module")
def alone(project: Project) -> Path:
    return train(project, "alone", UNEVEN)


def train(project: Project, name: str, overrides: str) -> Path:
    """Trains with a store of its own (two engines of one training are one fingerprint); its outputs."""
    folder = project.folder / "outputs" / name
    project.env["DVC_ROOT"] = str(project.folder / f"store_{name}")
    said = project.run(f"{TRAIN} {overrides} runtime.output_dir={folder}")
    assert "Traceback" not in said
    assert ("2 processes" in said) is ("runtime=" in overrides)
    return folder


def differences(one: Path, other: Path) -> dict[str, float]:
    """The largest of the weights and of each curve."""
    weights, others = (load_file(next(folder.glob("models/adapter/*.safetensors"))) for folder in (one, other))
    assert weights.keys() == others.keys()
    found = {"weights": max(float((weights[name] - others[name]).abs().max()) for name in weights)}
    curves, other_curves = (
        (folder / "reports/train/history.jsonl").read_text().splitlines() for folder in (one, other)
    )
    assert len(curves) == len(other_curves)
    for line, other_line in zip(curves, other_curves, strict=True):
        event, other_event = json.loads(line), json.loads(other_line)
        assert event.keys() == other_event.keys()
        for key in event:
            found[key] = max(found.get(key, 0.0), abs(event[key] - other_event[key]))
    return found


def test_ddp_gives_the_result_of_one_process(project: Project, alone: Path) -> None:
    found = differences(alone, train(project, "ddp", f"runtime=ddp {UNEVEN}"))
    weights = found.pop("weights")  # Adam's first steps are as large for a small gradient as for a large one
    assert max(found.values()) < TOLERANCE, found
    assert weights < 1e-4
    assert json.loads((project.folder / "outputs/ddp/metrics/train.json").read_text())["num_processes"] == 2


@pytest.mark.slow
def test_ddp_gives_the_weights_of_one_process_where_micro_batches_are_cut_alike(project: Project) -> None:
    found = differences(train(project, "even", EVEN), train(project, "even_ddp", f"runtime=ddp {EVEN}"))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.slow
def test_another_seed_is_seen_as_another_result(project: Project, alone: Path) -> None:
    """Negative control: the comparison finds a training that is not the same."""
    found = differences(alone, train(project, "seed", f"{UNEVEN} train.seed=1"))
    assert min(found["weights"], found["validation.loss"]) > 10 * TOLERANCE, found


def test_fsdp_shards_a_base_in_4_bits_and_its_adapter_is_whole_and_merges(project: Project, alone: Path) -> None:
    folder = train(
        project, "fsdp", f"runtime=fsdp runtime.keep_quantized=always train.gradient_checkpointing=true {UNEVEN}"
    )
    found = differences(alone, folder)
    weights = found.pop("weights")
    assert max(found.values()) < TOLERANCE, found
    assert weights < 1e-3
    settings = f"train.eval_steps=4 train.gradient_checkpointing=true {UNEVEN} runtime.inputs_dir={folder}"
    for stage in ("evaluate", "merge"):
        project.run(f"python -m stages.{stage} {settings} runtime.output_dir={folder}")
    merge = json.loads((folder / "metrics/merge.json").read_text())
    assert merge["mean_kl"] < 1e-6
    assert merge["top1_agreement"] >= 0.9999


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("deepspeed_zero2", ""),
        ("deepspeed_zero3", "runtime.keep_quantized=always train.gradient_checkpointing=true"),
    ],
)
def test_deepspeed_gives_the_result_of_one_process(project: Project, alone: Path, engine: str, options: str) -> None:
    found = differences(alone, train(project, engine, f"runtime={engine} {options} {UNEVEN}"))
    weights = found.pop("weights")
    assert max(found.values()) < TOLERANCE, found
    assert weights < 1e-3


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.timeout(900)
def test_a_checkpoint_of_deepspeed_is_gone_on_with_by_any_engine(project: Project) -> None:
    """ZeRO-2 stops, ZeRO-3 goes on and stops, ZeRO-2 goes on and stops, one process ends it."""
    steps = "train.max_steps=12 runtime.checkpoint_steps=2"
    whole = train(project, "long", steps)
    store, folder = project.folder / "store_stopped", project.folder / "outputs/stopped"
    project.env["DVC_ROOT"] = str(store)
    for engine, is_resumed in (("deepspeed_zero2", False), ("deepspeed_zero3", True), ("deepspeed_zero2", True)):
        said = stop_after_checkpoint(project, store, f"{TRAIN} runtime={engine} {steps} runtime.output_dir={folder}")
        assert ("going on after step" in said) is is_resumed, said
        assert "stopped by SIGTERM" in said
        assert "Traceback" not in said
    assert "going on after step" in project.run(f"{TRAIN} {steps} runtime.output_dir={folder}")
    found = differences(whole, folder)
    weights = found.pop("weights")
    assert max(found.values()) < TOLERANCE, found
    assert weights < 1e-3


def stop_after_checkpoint(project: Project, store: Path, command: str) -> str:
    """What a training said that got SIGTERM after its next checkpoint."""
    before = checkpoints(store)
    process = subprocess.Popen(
        f"exec {command}", shell=True, cwd=project.folder, env=project.env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 2 * SECONDS
    while not checkpoints(store) - before:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=SECONDS)
    return said


def checkpoints(store: Path) -> set[str]:
    return {path.name for path in store.glob(".training/*/checkpoints/checkpoint-*")}


@pytest.mark.slow
def test_one_of_two_killed_is_said_and_the_training_goes_on_to_the_same_bytes(project: Project) -> None:
    whole = train(project, "whole", "runtime=ddp train.max_steps=16 runtime.checkpoint_steps=2")
    store, folder = project.folder / "store_killed", project.folder / "outputs/killed"
    env = project.env | {"DVC_ROOT": str(store)}
    command = f"exec {TRAIN} runtime=ddp train.max_steps=16 runtime.checkpoint_steps=2 runtime.output_dir={folder}"
    options = {"shell": True, "cwd": project.folder, "env": env, "text": True, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
    deadline = time.monotonic() + SECONDS
    while not any(store.glob(".training/*/checkpoints/checkpoint-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.01)
    second(process.pid).send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1, said
    assert re.search(r"process 1 of 2 was ended by SIGKILL.*goes on from its last checkpoint", said), said
    assert "Traceback" not in said
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=SECONDS, **options)
    assert done.returncode == 0, done.stdout
    assert "going on after step" in done.stdout
    assert hash_path(folder / "models/adapter") == hash_path(whole / "models/adapter")


def second(launcher: int) -> psutil.Process:
    """The launcher's process of rank 1."""
    (found,) = [p for p in psutil.Process(launcher).children() if p.environ().get("RANK") == "1"]
    return found


@pytest.mark.slow
def test_a_killed_launcher_takes_its_processes_along(project: Project) -> None:
    store = project.folder / "store_orphans"
    env = project.env | {"DVC_ROOT": str(store)}
    command = f"exec {TRAIN} runtime=ddp train.max_steps=4000 train.eval_steps=4000 runtime.output_dir=outputs/orphans"
    process = subprocess.Popen(
        command, shell=True, cwd=project.folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + SECONDS
    while not any(store.glob(".training/*/lock")) or len(psutil.Process(process.pid).children()) < 2:
        assert time.monotonic() < deadline, "it did not start"
        time.sleep(0.05)
    children = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_the_same_error_of_all_is_said_once_and_a_stored_result_launches_nothing(project: Project, alone: Path) -> None:
    project.env["DVC_ROOT"] = str(project.folder / "store_alone")
    said = project.run(f"{TRAIN} {UNEVEN} runtime=ddp runtime.output_dir=outputs/again")
    assert "taken from .training/" in said
    assert "2 processes" not in said
    said = project.run(f"{TRAIN} {UNEVEN} lora.r=4096 runtime=ddp runtime.output_dir=outputs/error", ok=False)
    assert said.count("error: ") == 1
    assert said.count("lora.r: 4096 is over the width") == 1
    said = project.run("python -m stages.train -m lora.r=2 runtime=ddp hydra.sweep.dir=multirun/several", ok=False)
    assert "the points of a sweep are trained by one process each" in said
