"""The doctor's checks, each on something that is really broken and on the same thing whole."""

import ast
import contextlib
import dataclasses
import functools
import http.server
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import peft
import psutil
import pytest
import torch
from packaging.utils import canonicalize_name

from pipeline import (
    device_memory,
    doctor,
    doctor_device,
    doctor_machine,
    doctor_packages,
    doctor_project,
    doctor_refusal,
    native_attention,
    native_layers,
)
from pipeline import doctor_services as services
from pipeline.bnb import bnb
from pipeline.doctor_refusal import Check, Finding, Patient, RefusalError, refuse
from pipeline.imports import imported_files
from pipeline.parents import this_process
from tests.conftest import ROOT
from tests.records import settings

REVISION = "0" * 40


def statuses(check: Callable[[Patient], Iterator[Finding]], patient: Patient | None = None) -> list[str]:
    return [finding.status for finding in check(patient or Patient(settings()))]


def texts(check: Callable[[Patient], Iterator[Finding]], patient: Patient | None = None) -> str:
    return "\n".join(f"{f.status} {f.found} {f.remedy}" for f in check(patient or Patient(settings())))


def fake_package(folder: Path, name: str, version: str) -> Path:
    """A folder for Python's path in which a package is installed, as far as its metadata go."""
    metadata = folder / f"{name}-{version}.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


# packages


def test_a_wrong_version_in_front_of_the_right_one_stops_the_stages_that_import_it(tmp_path, monkeypatch):
    config = settings()
    refuse("train", config)
    monkeypatch.syspath_prepend(fake_package(tmp_path, "transformers", "4.40.0"))
    with pytest.raises(RefusalError, match=r"transformers 4\.40\.0 in .* is outside .*5\.3\n.*take .* off PYTHONPATH"):
        refuse("train", config)
    refuse("gate", config)  # which does not import it
    assert "fail transformers 4.40.0 in" in texts(doctor_packages.check_copies)
    assert "transformers 4.40.0 for 5.23.0" in texts(doctor_packages.check_pins)


def test_the_systems_copy_behind_the_environments_only_warns(tmp_path, monkeypatch) -> None:
    prefix, peft_version = tmp_path / "venv", importlib.metadata.version("peft")
    for version, system_too, status, remedy in (
        (peft_version, "true", "warn", "none is needed"),
        ("0.1.0", "true", "fail", "pip install -r constraints.txt"),
        (peft_version, "false", "fail", "unset PYTHONPATH"),  # the control
    ):
        own = fake_package(tmp_path / f"venv/{version}-{system_too}", "peft", version)
        (prefix / "pyvenv.cfg").write_text(f"home = /usr/bin\ninclude-system-site-packages = {system_too}\n")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "prefix", str(prefix))
            patch.syspath_prepend(own)
            found = texts(doctor_packages.check_copies)
        assert found.startswith(f"{status} peft {version} in "), found
        assert remedy in found


def test_the_environment_of_the_tests_is_whole() -> None:
    for check in ("check_pins", "check_requirements", "check_copies", "check_extras"):
        assert statuses(getattr(doctor_packages, check)) == ["ok"], check
    assert statuses(doctor_refusal.check_packages) == ["ok"]


def test_a_missing_package_is_named(monkeypatch) -> None:
    def without_peft(name: str) -> importlib.metadata.Distribution:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    found = importlib.metadata.distribution
    monkeypatch.setattr(importlib.metadata, "distribution", without_peft)
    assert "fail peft is missing" in texts(doctor_refusal.check_packages)
    assert statuses(doctor_refusal.check_packages, Patient(settings(), "quantize")) == ["ok"]


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("omegaconf", "2.4.0", "hydra-core 1.3.8 needs omegaconf<2.4,>=2.2; installed is 2.4.0"),
        ("hydra-ax-sweeper", "1.2.0", "it breaks every Hydra app"),
        ("tokenizers", "0.1.0", "transformers 5.23.0 needs tokenizers"),
    ],
)
def test_packages_that_do_not_fit_one_another(tmp_path, monkeypatch, name, version, said) -> None:
    monkeypatch.syspath_prepend(fake_package(tmp_path, name, version))
    assert said in texts(doctor_packages.check_requirements)


def test_each_stage_is_stopped_by_every_package_that_it_imports(monkeypatch) -> None:
    monkeypatch.setattr(ast, "parse", functools.cache(ast.parse))  # each file once, not once a stage
    owners = importlib.metadata.packages_distributions()
    unused = {Path("pipeline/doctor_refusal.py"), Path("pipeline/device_memory.py")}  # they use torch where it is used
    own = {*sys.stdlib_module_names, "pipeline", "stages", "hydra_plugins"}
    optional = {"mlflow", "mlflow-skinny", "mlflow-tracing", "sqlalchemy", "packaging"}
    optional |= {"lm-eval", "optuna", "deepspeed"}  # extras
    for stage, packages in doctor_refusal.STAGE_PACKAGES.items():
        modules: set[str] = set()
        files = {path for path in imported_files(f"stages.{stage}") if path.suffix == ".py"}
        for path in files - unused:
            for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    modules.add(node.module.split(".")[0])
        wanted = {canonicalize_name(owner) for module in modules - own for owner in owners.get(module, [module])}
        assert wanted - optional <= set(packages), stage
        assert {"hydra-core", "pyyaml"} <= wanted  # the walk does see imports


def test_extras_of_the_chosen_launcher(monkeypatch) -> None:
    patient = Patient(settings(), None, (("hydra/launcher", "ray"),))
    assert "ok ray" in texts(doctor_packages.check_extras, patient)
    whole = doctor_packages.distributions()
    monkeypatch.setattr(doctor_packages, "distributions", lambda: {k: v for k, v in whole.items() if k != "ray"})
    assert "is missing" in texts(doctor_packages.check_extras, patient)
    assert statuses(doctor_packages.check_extras) == ["ok"]


def test_extras_of_the_engine(monkeypatch) -> None:
    whole = {name: copies for name, copies in doctor_packages.distributions().items() if name != "deepspeed"}
    monkeypatch.setattr(doctor_packages, "distributions", lambda: whole)
    two = Patient(settings(runtime__engine="deepspeed", runtime__num_processes=2))
    assert "fail deepspeed<0.20,>=0.19, for the extra deepspeed: is missing" in texts(doctor_packages.check_extras, two)
    assert "-e '.[deepspeed]'" in texts(doctor_packages.check_extras, two)
    one = Patient(settings(runtime__engine="deepspeed"))  # which does not import it
    assert statuses(doctor_packages.check_extras, one) == ["warn"]
    assert statuses(doctor_packages.check_extras, Patient(settings(runtime__engine="fsdp"))) == ["ok"]


def test_a_python_that_is_too_old_ends_the_examination(monkeypatch) -> None:
    assert statuses(doctor_refusal.check_python) == ["ok"]
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    findings = list(doctor.examine([]))
    assert [finding.status for finding in findings] == ["fail"]
    assert "the project needs 3.11 or newer" in findings[0].found


# the device


def test_a_gpu_that_torch_does_not_use_stops_what_computes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor_refusal, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    auto, cpu, cuda = (settings(runtime__device=device) for device in ("auto", "cpu", "cuda"))
    refuse("train", auto)
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "nvidia0").touch()
    with pytest.raises(RefusalError, match=r"nvidia0 is there, but torch .* is a CPU build\n.*runtime.device=cpu"):
        refuse("train", auto)
    refuse("train", cpu)
    refuse("prepare", auto)  # computes nothing
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "for CUDA 13.0 finds none" in texts(doctor_refusal.check_gpu, Patient(auto))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refuse("train", auto)
    with pytest.raises(RefusalError, match="nvidia0 is there"):
        refuse("train", cuda)
    (tmp_path / "nvidia0").unlink()
    with pytest.raises(RefusalError, match=r"runtime\.device=cuda, but torch"):
        refuse("train", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert texts(doctor_refusal.check_gpu, Patient(cuda)) == "ok NVIDIA H200 "


@pytest.mark.parametrize(
    ("gpus", "runtime", "status", "said"),
    [
        (0, {"num_processes": 4}, "ok", "on the CPU"),
        (2, {"num_processes": 4, "device": "cpu"}, "ok", "on the CPU"),
        (2, {"num_processes": 2}, "ok", "2 of the training (ddp) on this machine, one a GPU; torch finds 2"),
        (4, {}, "ok", "torch finds 4"),
        (2, {"num_processes": 4}, "fail", "torch finds 2 GPUs here: one process a GPU set runtime.num_processes=2"),
        (2, {"num_processes": 4, "num_machines": 2}, "ok", "one a GPU"),
        (1, {"num_processes": 4, "num_machines": 2}, "fail", "set runtime.num_processes=2"),
        (4, {"engine": "fsdp"}, "warn", "one process alone cuts nothing set runtime.num_processes=4"),
    ],
)
def test_processes_against_gpus(monkeypatch, gpus, runtime, status, said) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = texts(doctor_device.check_processes, Patient(settings(**{f"runtime__{k}": v for k, v in runtime.items()})))
    assert found.startswith(status)
    assert said in found


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 6), ["sm_80", "sm_90"], True),  # within a major version, upwards
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_86"], False),
        ((9, 0), ["sm_80", "compute_80"], True),  # PTX
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_120a"], False),
        ((12, 0), ["sm_120"], True),
        ((7, 0), ["sm_75", "compute_90"], False),
        ((6, 1), [], False),
    ],
)
def test_which_cards_a_build_has_code_for(capability, archs, runs) -> None:
    assert doctor_device.runs_on(capability, archs) is runs


def test_the_trials_on_this_device() -> None:
    device = doctor_device.find_device("auto")
    for name, trial in doctor_device.TRIALS.items():
        assert {finding.status for finding in trial(device)} == {"ok"}, name


def test_an_8_bit_optimizer_that_steps_wrongly_fails(monkeypatch) -> None:
    class TenPercentMore(bnb.optim.AdamW8bit):
        def __init__(self, parameters, lr, **options):
            super().__init__(parameters, lr=1.1 * lr, **options)

    monkeypatch.setattr(bnb.optim, "AdamW8bit", TenPercentMore)
    (finding,) = doctor_device.try_optimizer("cpu")
    assert finding.status == "fail"
    monkeypatch.setattr(bnb.optim, "AdamW8bit", torch.optim.AdamW)  # right, and not in 8 bits
    (finding,) = doctor_device.try_optimizer("cpu")
    assert finding.status == "fail"


def test_a_lora_layer_that_is_wrong_or_not_4_bit_fails(monkeypatch) -> None:
    layer = peft.tuners.lora.Linear4bit
    forward = layer.forward
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda self, x: 1.05 * forward(self, x))
        (finding,) = doctor_device.try_peft("cpu")
        assert finding.status == "fail"
    monkeypatch.setattr(peft.tuners.lora.model, "is_bnb_4bit_available", lambda: False)  # peft without its 4-bit layer
    (finding,) = doctor_device.try_peft("cpu")
    assert finding.status == "fail"
    assert "(Linear)" in finding.found


def test_attention_is_compiled_right_or_said_to_be_torchs(monkeypatch) -> None:
    (finding,) = doctor_device.try_attention("cpu")
    assert finding.status == "ok"
    assert not list(doctor_device.try_attention("cuda"))
    with monkeypatch.context() as patch:
        patch.setattr(native_attention, "attend", lambda query, *_: 1.01 * query.transpose(1, 2))
        (finding,) = doctor_device.try_attention("cpu")
        assert finding.status == "fail"
    monkeypatch.setenv("CC", "/nowhere/cc")
    native_attention.compile_kernel.cache_clear()
    (finding,) = doctor_device.try_attention("cpu")
    assert finding.status == "warn"
    assert "/nowhere/cc" in finding.found


def test_layers_are_compiled_right_or_said_to_be_torchs(monkeypatch) -> None:
    (finding,) = doctor_device.try_layers("cpu")
    assert finding.status == "ok"
    assert not list(doctor_device.try_layers("cuda"))
    monkeypatch.setattr(native_layers, "_library", lambda: None)
    (finding,) = doctor_device.try_layers("cpu")
    assert finding.status == "warn"


@pytest.mark.parametrize("wrong", ["norm", "norm_backward", "swiglu", "swiglu_backward", "rotate"])
def test_a_layer_that_is_compiled_wrong_fails(wrong: str, monkeypatch) -> None:
    call = native_layers._call

    def call_wrongly(name: str, first: torch.Tensor, *others) -> None:
        call(name, first + 0.1 if name == wrong else first, *others)

    monkeypatch.setattr(native_layers, "_call", call_wrongly)
    native_layers._is_norm.cache_clear()
    (finding,) = doctor_device.try_layers("cpu")
    native_layers._is_norm.cache_clear()
    assert finding.status == "fail"


def test_a_trial_that_raises_is_a_finding_and_the_next_ones_run(monkeypatch, capsys) -> None:
    def broken(device: str) -> Iterator[Finding]:
        raise NameError("name 'str2optimizer8bit_blockwise' is not defined")
        yield

    fine = {"bitsandbytes": broken, "peft": lambda device: iter([Finding("ok", "fine")])}
    monkeypatch.setattr(doctor_device, "TRIALS", fine)
    doctor_device.main(["cpu"])
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["name"], first["status"], second["status"]) == ("bitsandbytes", "fail", "ok")
    assert "NameError: name 'str2optimizer8bit_blockwise'" in first["found"]


def test_a_library_that_kills_the_process_is_a_finding(tmp_path, monkeypatch) -> None:
    (tmp_path / "bitsandbytes.py").write_text("import os\nos.kill(os.getpid(), 4)\n")  # SIGILL
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    findings = list(doctor_device.check_device(Patient(settings())))
    assert [(f.name, f.status) for f in findings] == [("torch", "ok"), ("device", "fail")]
    assert signal.Signals.SIGILL.name in findings[1].found


def test_kernels_that_the_settings_do_not_use_only_warn(monkeypatch) -> None:
    line = json.dumps(dataclasses.asdict(Finding("fail", "no library", "", "bitsandbytes")))
    done = subprocess.CompletedProcess([], 0, line + "\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    config = settings(quantization__method="none", train__optimizer="adamw")
    assert statuses(doctor_device.check_device, Patient(config)) == ["warn"]
    assert statuses(doctor_device.check_device) == ["fail"]


# the machine


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB, full to the last byte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mounting a small disk takes root: {done.stderr.strip()}")
    try:
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_stops_a_stage(small_disk, monkeypatch) -> None:
    config = settings(runtime__output_dir=str(small_disk / "outputs/1"))
    with pytest.raises(RefusalError, match=rf"{small_disk}: 0\.0 GB free, 0\.2 GB are needed\n.*dvc gc"):
        refuse("gate", config)
    monkeypatch.setenv("TMPDIR", str(small_disk))
    assert f"fail {small_disk}: 0.0 GB free" in texts(doctor_machine.check_room_for_all)
    monkeypatch.delenv("TMPDIR")
    assert statuses(doctor_machine.check_room_for_all) == ["ok"]


def test_outputs_larger_than_the_disk_fail(monkeypatch) -> None:
    monkeypatch.setattr("pipeline.memory.disk_bytes", lambda *_: {"merged": 10**15})
    assert "fail" in texts(doctor_machine.check_room_for_all)
    assert "2000000.2 GB are needed" in texts(doctor_machine.check_room_for_all)  # cached too, and temporary files


def test_a_disk_that_cannot_be_written(monkeypatch, tmp_path) -> None:
    assert doctor_refusal.check_room(tmp_path, 1).status == "ok"
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert doctor_refusal.check_room(tmp_path, 1).status == "fail"


def test_a_project_that_cannot_be_written_stops_what_writes_there(tmp_path, monkeypatch) -> None:
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.setattr(os, "access", lambda path, _: not Path(path).is_relative_to(project))  # root may everywhere
    elsewhere, inside = (settings(runtime__output_dir=str(folder / "out")) for folder in (tmp_path, project))
    for stage in ("prepare", "quantize", "merge", "report", "gate"):
        refuse(stage, elsewhere)
    for stage, config in (("train", elsewhere), ("evaluate", elsewhere), ("point", elsewhere), ("gate", inside)):
        with pytest.raises(RefusalError, match=f"{project}: cannot be written"):
            refuse(stage, config)


def test_a_disk_that_does_not_tell_its_size_is_not_full(tmp_path, monkeypatch) -> None:
    disk = os.statvfs(tmp_path)
    for blocks, status in ((0, "ok"), (1000, "fail")):
        told = os.statvfs_result((disk.f_bsize, disk.f_frsize, blocks, 0, 0, 0, 0, 0, 0, 255, 0))
        monkeypatch.setattr(os, "statvfs", lambda _, told=told: told)
        found = doctor_refusal.check_room(tmp_path, 1)
        assert found.status == status
        assert ("0.0 GB free" in found.found) is (status == "fail")


def test_limits_of_the_cgroup(tmp_path, monkeypatch) -> None:
    own = tmp_path / "own"
    own.write_text("0::/\n")
    monkeypatch.setattr(device_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(device_memory, "OWN_CGROUPS", own)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * 10**9, available=32 * 10**9))
    assert "ok 32.0 GB free of 64.0 GB, swap" in texts(doctor_machine.check_memory)
    monkeypatch.setattr(doctor_machine, "_cgroups", lambda: [tmp_path])
    for name, text in {"memory.max": "5000000000", "memory.current": "500000000", "cpu.max": "100000 100000"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "memory.stat").write_text("inactive_file 0\n")
    assert "ok 4.5 GB free below a cgroup's limit" in texts(doctor_machine.check_memory)
    (tmp_path / "memory.current").write_text("4500000000")
    assert "warn 0.5 GB free below" in texts(doctor_machine.check_memory)
    (tmp_path / "memory.stat").write_text("inactive_file 4000000000\n")  # the page cache
    assert "ok 4.5 GB free below" in texts(doctor_machine.check_memory)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert statuses(doctor_machine.check_threads) == ["ok"]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "warn" in texts(doctor_machine.check_threads)
    assert "runtime.num_threads=1" in texts(doctor_machine.check_threads)
    (tmp_path / "cpu.max").write_text("max 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert statuses(doctor_machine.check_threads) == ["ok"]


@pytest.mark.parametrize(
    ("before", "check", "status"),
    [
        ("ulimit -n 256; ", "open files", "warn"),
        ("ulimit -n 2048; ", "open files", "ok"),
        ("PYTHONIOENCODING=latin-1 ", "text", "warn"),
        ("PYTHONIOENCODING=utf-8 ", "text", "ok"),
    ],
)
def test_limits_of_the_shell(before, check, status) -> None:
    code = (
        "from pipeline import doctor_machine as m\nfrom pipeline.doctor_refusal import Patient\n"
        f"print([f.status for f in m.check_{check.replace(' ', '_')}(Patient(None))])"
    )
    command = f'{before}{sys.executable} -c "{code}"'
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"['{status}']", done.stderr


def test_a_clock_that_is_behind(monkeypatch) -> None:
    assert statuses(doctor_machine.check_clock) == ["ok"]
    monkeypatch.setattr(doctor_machine.time, "time", lambda: 1e9)
    assert statuses(doctor_machine.check_clock) == ["warn"]


# the project


def test_git_and_dvc(tmp_path, monkeypatch) -> None:
    assert statuses(doctor_project.check_git) == statuses(doctor_project.check_dvc) == ["ok"]
    monkeypatch.setattr(doctor_project, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "no git repository" in texts(doctor_project.check_git)
    assert statuses(doctor_project.check_dvc) == ["fail"]
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert "no commit yet" in texts(doctor_project.check_git)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    analytics = false\n['remote \"team\"']\n    url = s3://x\n")
    assert "hydra.enabled is not set" in texts(doctor_project.check_dvc)
    (tmp_path / ".dvc/config.local").write_text("[hydra]\n    enabled = True\n")
    assert statuses(doctor_project.check_dvc) == ["ok"]


def test_a_repository_of_another_user_is_one(tmp_path, monkeypatch) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(doctor_project, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "none"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own, for tests
    found = texts(doctor_project.check_git)
    assert "another user owns" in found
    assert found.endswith(f"`git config --global --add safe.directory {tmp_path}`")


def test_params_and_code_deps(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert statuses(doctor_project.check_params_file) == ["ok"]
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(text.replace("lora_alpha: ", "lora_alpha: 9"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert "lora.lora_alpha: 9" in texts(doctor_project.check_params_file)
    monkeypatch.setattr(ast, "parse", functools.cache(ast.parse))
    dvc_yaml = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    monkeypatch.setattr(doctor_project, "ROOT", tmp_path)
    (tmp_path / "dvc.yaml").write_text(dvc_yaml.replace("      - pipeline/errors.py\n", ""), encoding="utf-8")
    assert statuses(doctor_project.check_code_deps) == ["fail"]


def test_hydra_without_the_projects_plugins(monkeypatch) -> None:
    from hydra.core.config_store import ConfigStore

    assert statuses(doctor_project.check_hydra) == ["ok"]
    monkeypatch.setattr(ConfigStore.instance(), "list", lambda group: ["basic.yaml"])
    assert "grid.yaml missing" in texts(doctor_project.check_hydra)


def test_a_large_model_on_a_disk_without_links(monkeypatch) -> None:
    monkeypatch.setattr("dvc_objects.fs.generic.test_links", lambda *_: [])
    assert statuses(doctor_project.check_dvc_cache) == ["ok"]
    monkeypatch.setattr(doctor_project, "_model_bytes", lambda _: 16 * 10**9)
    if (ROOT / ".dvc/cache").exists():
        assert "a model of 16.0 GB is there twice" in texts(doctor_project.check_dvc_cache)


def test_a_cache_or_a_project_that_cannot_be_written(monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != ROOT)  # root may everywhere
    assert f"warn {ROOT}: cannot be written, so `dvc repro` cannot run" in texts(doctor_project.check_dvc_cache)
    if (ROOT / ".dvc/cache/files/md5").exists():
        monkeypatch.setattr(os, "access", lambda path, _: Path(path) == ROOT)
        assert "md5: cannot be written" in texts(doctor_project.check_dvc_cache)


def test_unfinished_and_orphaned_trainings(tmp_path, monkeypatch) -> None:
    from pipeline.store import locked

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert statuses(doctor_project.check_store) == ["ok"]
    with locked("a" * 64) as folder:
        (folder / "checkpoint").write_text("weights")
        assert statuses(doctor_project.check_store) == ["ok"]
        owner = json.loads((folder / "lock").read_text())
        dead = {"pid": 2**22 + 1, "created": 0.0}
        (folder / "lock").write_text(json.dumps(owner | {"starter": dead}))
        assert "whose dvc is dead" in texts(doctor_project.check_store)
        (folder / "lock").write_text(json.dumps(owner | {"starter": dataclasses.asdict(this_process())}))
        assert statuses(doctor_project.check_store) == ["ok"]
    assert "1 of 1 stored trainings are unfinished" in texts(doctor_project.check_store)


def test_a_gpu_held_for_a_dead_process(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert "no GPU is held" in texts(doctor_project.check_leases)
    assert not list(tmp_path.iterdir())
    from pipeline.gpu_leases import Gpu, lease

    with lease([Gpu(0, "GPU-1", None)]):
        assert "1 GPUs are held" in texts(doctor_project.check_leases)
        file = tmp_path / "lora-pipeline-gpus/GPU-1"
        file.write_text(file.read_text().replace(f"process {os.getpid()} ", f"process {2**22 + 1} "))
        assert "which is gone; a child of it holds the GPU" in texts(doctor_project.check_leases)
    assert "no GPU is held" in texts(doctor_project.check_leases)


def test_a_lease_that_cannot_be_opened(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "lora-pipeline-gpus/GPU-1").mkdir(parents=True)  # root may open every file, and no folder
    assert texts(doctor_project.check_leases).startswith(f"warn {tmp_path}/lora-pipeline-gpus/GPU-1: cannot be opened")


# services


@pytest.fixture
def silent_server() -> Iterator[int]:
    """The port of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def hub(monkeypatch) -> Iterator[dict[str, object]]:
    """A Hub on this machine, online; `answer` is what it says to a question about a model."""
    answer: dict[str, object] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_api = self.path.startswith("/api/")
            self.send_response(int(answer.get("status", 200)) if is_api else 200)  # type: ignore[call-overload]
            for name, value in answer.get("headers", {}).items() if is_api else ():  # type: ignore[attr-defined]
                self.send_header(name, value)
            body = json.dumps({"id": "me/model", "sha": REVISION, "gated": answer.get("gated", False)}).encode()
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    yield answer
    server.shutdown()
    server.server_close()


def of_hub() -> Patient:
    return Patient(settings(model__hub_id="me/model", model__revision=REVISION))


def test_what_the_hub_says_of_the_model(hub, monkeypatch) -> None:
    assert "answers; these settings take no model" in texts(services.check_hub)
    assert texts(services.check_hub, of_hub()).startswith("ok the Hub has me/model")
    assert statuses(services.check_token, of_hub()) == ["warn"]
    hub["gated"] = "manual"
    assert "warn me/model: its owner lets in" in texts(services.check_hub, of_hub())
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    assert texts(services.check_hub, of_hub()).startswith("ok the Hub has me/model")
    assert texts(services.check_token, of_hub()) == "ok a token of the Hub is there "
    for status, code, said in (
        (404, "RevisionNotFound", "fail the Hub has no me/model at"),
        (404, "RepoNotFound", "or it is private"),
        (403, "GatedRepo", "warn me/model: its owner"),
        (500, "", "fail the Hub does not tell"),
    ):
        hub |= {"status": status, "headers": {"X-Error-Code": code}}
        assert said in texts(services.check_hub, of_hub()), code


def test_a_hub_out_of_reach_fails_only_what_needs_it(hub, free_port, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free_port}")
    assert statuses(services.check_hub) == ["ok"]
    assert "fail http" in texts(services.check_hub, of_hub())


def test_offline_the_cache_decides(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refuse("train", settings())
    config = of_hub().config
    assert config is not None
    with pytest.raises(RefusalError, match=r"offline \(HF_HUB_OFFLINE\), and .* lacks me/model at 0+\n.*hf download"):
        refuse("train", config)
    refuse("gate", config)
    snapshot = tmp_path / "models--me--model/snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refuse("train", config)
    assert statuses(services.check_hub) == ["ok"]


def test_mlflow_that_does_not_answer(free_port, silent_server, monkeypatch) -> None:
    for port in (free_port, silent_server):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:pass-word@127.0.0.1:{port}?api_key=val-ue")
        (finding,) = doctor.run(Check("mlflow", services.check_mlflow), Patient(settings(runtime__tracking=True)))
        assert finding.status == "fail"
        assert "within 3 s" in finding.found
        assert "pass-word" not in finding.found
        assert "val-ue" not in services.hide(finding.found, services.secrets())
        assert statuses(services.check_mlflow, Patient(settings(runtime__tracking=False))) == ["ok"]
        refuse("train", settings(runtime__tracking=True))  # tracking stops no stage


def test_mlflow_without_a_store_yet(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    patient = Patient(settings(runtime__tracking=True))
    assert "is not there yet" in texts(services.check_mlflow, patient)
    assert not list(tmp_path.iterdir())
    (tmp_path / "mlflow.db").write_text("no database at all, but long enough to be read as one's header " * 20)
    assert statuses(services.check_mlflow, patient) == ["fail"]


def test_nothing_secret_is_printed(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    monkeypatch.setenv("https_proxy", "http://me:p%40ss@proxy:3128")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://db/mlflow?password=key-word&sslmode=require")
    text = services.hide("token hf_abc, http://me:p%40ss@proxy, p@ss, key-word, require me", services.secrets())
    assert text == "token ***, http://***@proxy, ***, ***, require me"


# the command


def test_a_check_that_breaks_is_a_finding() -> None:
    def broken(patient: Patient) -> Iterator[Finding]:
        yield Finding("ok", "so far")
        raise KeyError("nothing")

    assert [f.status for f in doctor.run(Check("it", broken), Patient(None))] == ["ok", "fail"]


@pytest.mark.parametrize(
    ("status", "options", "code"), [("ok", [], 0), ("warn", [], 0), ("warn", ["--strict"], 1), ("fail", [], 1)]
)
def test_exit_codes(monkeypatch, capsys, status, options, code) -> None:
    findings = [Finding("ok", "fine", "", "one"), Finding(status, "found", "mend it", "two")]
    monkeypatch.setattr(doctor, "examine", lambda *_: iter(findings))
    assert doctor.main(options) == code
    assert f"{status:<4}  two             found\n" in capsys.readouterr().out
    assert doctor.main([*options, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["status"] == status


def test_wrong_settings_are_said_and_the_rest_is_checked(capsys) -> None:
    assert doctor.main(["lora.r=0", "--only", "disk", "--only", "room"]) == 1
    output = capsys.readouterr().out
    assert "lora.r: 0 must be at least 1" in output
    assert "ok    disk" in output
    with pytest.raises(SystemExit):
        doctor.main(["--only", "disc"])


def test_only_what_is_always_looked_at(capsys) -> None:
    assert [finding.name for finding in doctor.examine([], ["python"])] == ["python"]
    assert [finding.name for finding in doctor.examine([], ["python", "settings"])] == ["python", "settings"]
    assert [finding.name for finding in doctor.examine([], ["python", "text"])] == ["python", "settings", "text"]


def test_checks_of_the_settings_bear_wrong_ones() -> None:
    checks = {check.name: check for check in doctor.table()}
    for name in ("gpu", "disk", "base", "extras", "dvc cache", "processes", "room", "threads", "token"):
        assert "the check itself broke" not in "".join(f.found for f in doctor.run(checks[name], Patient(None))), name
