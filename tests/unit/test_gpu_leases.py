"""GPUs as nvidia-smi shows them, and who may use which: real processes, and a stand-in for nvidia-smi alone."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.gpu_leases import Gpu, LeaseError, lease, visible_gpus
from tests.conftest import ROOT

A, B, MIG_1, MIG_2 = "GPU-aaaa1111-22", "GPU-bbbb3333-44", "MIG-cccc-1", "MIG-cccc-2"
TWO_GPUS = f"0, {A}, 81559, Disabled\n1, {B}, 24564, [N/A]\n"
GPUS = [Gpu(0, A, 81559 * 2**20), Gpu(1, B, 24564 * 2**20)]
HOLD = """
import sys
from pipeline.gpu_leases import lease, visible_gpus
with lease(visible_gpus()) as held:
    print(held.uuid, flush=True)
    sys.stdin.read()
"""
HOLD_BY_CHILD = """
import subprocess, sys, time
from pipeline.gpu_leases import lease, visible_gpus
with lease(visible_gpus()) as held:
    child = subprocess.Popen(["sleep", "60"], pass_fds=[held.descriptor] if sys.argv[1] == "passed" else [])
    print(child.pid, flush=True)
    time.sleep(60)
"""
Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """machine(csv, code=0, mig=""): makes nvidia-smi answer so; leases are the test's own."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")

    def answer(text: str, code: int = 0, mig: str = "") -> None:
        tool = tmp_path / "bin/nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(
            f"#!/bin/sh\nif [ $1 = -L ]; then cat <<END\n{mig}END\nelse cat <<END\n{text}END\nfi\nexit {code}\n"
        )
        tool.chmod(0o755)

    return answer


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """start(code, *arguments): a Python process that prints a line when it holds its lease."""
    started = []

    def start(code: str, *arguments: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, [A, B]), ("0", [A]), ("1,0", [B, A]), ("1, 1", [B]), (A, [A]), ("GPU-b", [B]),
        ("", []), ("-1", []), ("1,-1,0", [B]), ("NoDevFiles", []),
    ],
)  # fmt: skip
def test_cuda_visible_devices_is_read_as_cuda_does(machine, monkeypatch, choice, expected):
    machine(TWO_GPUS)
    if choice is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", choice)
    assert [gpu.uuid for gpu in visible_gpus()] == expected


def test_gpus_have_their_memory(machine):
    machine(TWO_GPUS)
    assert visible_gpus() == GPUS


@pytest.mark.parametrize("choice", ["2", "GPU-", "GPU-cccc", "cuda:0"])
def test_a_gpu_that_is_not_there_is_an_error(machine, monkeypatch, choice):
    machine(TWO_GPUS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", choice)
    with pytest.raises(ConfigError, match=f"CUDA_VISIBLE_DEVICES: '{choice}'.*{A}"):
        visible_gpus()


def test_mig_devices_stand_in_for_their_gpu(machine, monkeypatch):
    mig = (
        f"GPU 1: NVIDIA H100 80GB HBM3 (UUID: {B})\n  MIG 3g.40gb     Device  0: (UUID: {MIG_1})\n"
        f"  MIG 1g.10gb+me  Device  1: (UUID: {MIG_2})\n"
    )
    machine(f"0, {A}, 81559, Disabled\n1, {B}, 81559, Enabled\n", mig=mig)
    assert visible_gpus() == [GPUS[0], Gpu(1, MIG_1, 40 * 2**30), Gpu(1, MIG_2, 10 * 2**30)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", MIG_2)
    assert [gpu.uuid for gpu in visible_gpus()] == [MIG_2]


def test_without_nvidia_smi_there_are_none(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []


def test_a_broken_driver_is_said(machine, caplog):
    machine("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", code=9)
    assert visible_gpus() == []
    assert "couldn't communicate" in caplog.text


def test_two_processes_get_two_gpus_and_a_third_waits(machine, start, caplog):
    machine(TWO_GPUS)
    first, second = start(HOLD), start(HOLD)
    held = {process.stdout.readline().strip() for process in (first, second)}
    assert held == {A, B}
    with (
        pytest.raises(LeaseError, match=rf"0 \({A}\) is held by process ({first.pid}|{second.pid}) of "),
        lease(GPUS, 0),
    ):
        pass
    third = start(HOLD)
    time.sleep(1)
    assert third.poll() is None
    first.send_signal(signal.SIGKILL)  # no clean-up
    assert third.stdout.readline().strip() in held


def test_other_folders_are_other_leases(machine, start, monkeypatch, tmp_path_factory):
    """Without the shared file nothing keeps two processes apart: it is what the tests above look at."""
    machine(f"0, {A}, 81559, Disabled\n")
    assert start(HOLD).stdout.readline().strip() == A
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("elsewhere")))
    with lease(GPUS[:1], 0) as held:
        assert held.uuid == A


@pytest.mark.parametrize("how", ["passed", "kept"])
def test_a_child_that_was_given_the_lease_keeps_it(machine, start, how):
    machine(f"0, {A}, 81559, Disabled\n")
    parent = start(HOLD_BY_CHILD, how)
    child = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        if how == "passed":
            with pytest.raises(LeaseError), lease(GPUS[:1], 0):
                pass
        else:
            with lease(GPUS[:1], 0):
                pass
    finally:
        os.kill(child, signal.SIGKILL)
    with lease(GPUS[:1], 5):
        pass


def test_a_lease_is_logged_once_and_given_back(machine, start, caplog):
    machine(TWO_GPUS)
    caplog.set_level("INFO")
    with lease(GPUS[:1]) as held:
        assert (held.index, held.uuid, held.environment()) == (0, A, {"CUDA_VISIBLE_DEVICES": A})
        with pytest.raises(LeaseError), lease(GPUS[:1], 1.2):
            pass
    assert [r.message for r in caplog.records if "waiting for a GPU" in r.message] == [caplog.records[0].message]
    assert f"process {os.getpid()}" in caplog.text
    with lease(GPUS[:1], 0):
        pass


def test_other_users_can_take_their_turn(machine, tmp_path):
    before = os.umask(0o077)
    try:
        with lease(GPUS[:1]):
            pass
    finally:
        os.umask(before)
    folder = tmp_path / "lora-pipeline-gpus"
    assert folder.stat().st_mode & 0o7777 == 0o1777
    assert [(p.name, p.stat().st_mode & 0o777) for p in folder.iterdir()] == [(A, 0o666)]


def test_no_gpu_is_an_error():
    with pytest.raises(ConfigError, match="no GPU to lease"), lease([]):
        pass


def test_a_command_gets_a_leased_gpu(machine):
    machine(f"0, {A}, 81559, Disabled\n")
    command = [sys.executable, "-m", "pipeline.gpu_leases", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES; read line; exit 3"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == A
    with pytest.raises(LeaseError, match=f"process {process.pid} of "), lease(GPUS[:1], 0):
        pass
    process.communicate("go on\n")
    assert process.returncode == 3
    with lease(GPUS[:1], 0):
        pass


def test_a_command_without_a_gpu_fails_in_words(machine):
    machine("")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.gpu_leases", "true"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gpu_leases: error: no GPU to lease")
    assert "Traceback" not in done.stderr
    machine(TWO_GPUS)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.gpu_leases", "no-such-program"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "no-such-program: No such file" in done.stderr
