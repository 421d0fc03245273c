"""The doctor on the machine: disk, memory, threads, open files, text encoding, clock."""

import locale
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.doctor_refusal import FLOOR_BYTES, ROOT, Finding, Patient, check_room, existing, is_cached
from pipeline.errors import PipelineError
from pipeline.workspace import project_root

CGROUP = Path("/sys/fs/cgroup")
MEMORY_BYTES = 4_000_000_000  # torch, transformers, MLflow and a tiny model
NUM_FILES = 1024
SLACK_SECONDS = 86400.0  # clocks of two machines may differ


def check_room_for_all(patient: Patient) -> Iterator[Finding]:
    """Room for the outputs (by the plan), temporary files and downloads; for their sum, where they share a disk."""
    outputs, download, text = _planned_bytes(patient)
    needs = {
        existing(project_root()): max(outputs, FLOOR_BYTES),
        existing(Path(os.environ.get("TMPDIR") or "/tmp")): FLOOR_BYTES,
    }
    if patient.config is not None and patient.config.model.hub_id is not None:
        from huggingface_hub import constants

        needs[existing(Path(constants.HF_HUB_CACHE))] = max(download, FLOOR_BYTES)
    on_disk: dict[int, int] = defaultdict(int)
    for folder, num_bytes in needs.items():
        on_disk[folder.stat().st_dev] += num_bytes
    findings = [check_room(folder, on_disk[folder.stat().st_dev]) for folder in needs]
    wrong = [found for found in findings if found.status != "ok"]
    yield from wrong or [Finding("ok", f"{text}; {'; '.join(found.found for found in findings)}")]


def _planned_bytes(patient: Patient) -> tuple[int, int, str]:
    """Bytes of the stages' outputs (twice: DVC's cache keeps them, too) and of the download, and a text on both."""
    model = patient.config.model if patient.config else None
    if patient.config is None or model is None:
        return 0, 0, "the settings are wrong, so what outputs need is not known"
    if model.hub_id is not None and not is_cached(model):
        return 0, 0, "the model's config.json is not in the cache, so what outputs need is not known"
    from pipeline.architecture import read_architecture
    from pipeline.memory import disk_bytes
    from pipeline.model_files import model_folder
    from pipeline.modeling import load_config

    try:
        config = load_config(model_folder(model, weights=False), model.trust_remote_code)
        architecture = read_architecture(config, model.path, model.trust_remote_code)
    except PipelineError as error:
        return 0, 0, f"what outputs need is not known ({error})"
    parts = disk_bytes(architecture, patient.config)
    listed = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in parts.items())
    text = f"outputs {sum(parts.values()) / 1e6:.1f} MB ({listed}), as much again in DVC's cache"
    return 2 * sum(parts.values()), 2 * architecture.num_parameters, text  # the Hub's weights: 16 bits each


def check_memory(patient: Patient) -> Iterator[Finding]:
    """Free memory, or less where a cgroup (container, Slurm) sets a limit; swap."""
    from pipeline.device_memory import free_bytes  # imports torch

    memory, free = psutil.virtual_memory(), free_bytes("cpu")
    text = f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB"
    if free < 0.95 * memory.available:  # what is available was looked at twice, and changes
        text = f"{free / 1e9:.1f} GB free below a cgroup's limit (container, Slurm); the machine has {text}"
    text += f", swap {psutil.swap_memory().free / 1e9:.1f} GB free"
    if free < MEMORY_BYTES:
        found = f"{text}; a stage takes up to {MEMORY_BYTES / 1e9:.0f} GB even on the smallest model"
        yield Finding("warn", found, "end other programs, or raise the container's limit")
    else:
        yield Finding("ok", text)


def _cgroups() -> Iterator[Path]:
    """Folders of the process's cgroup (v2), from its own to the root."""
    file = Path("/proc/self/cgroup")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    own = CGROUP / next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(CGROUP))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:  # this kernel, or this level, has none
        return []


def check_threads(patient: Patient) -> Iterator[Finding]:
    """Threads of torch against the cores that the process may use (affinity, the cgroup's quota)."""
    cores = float(len(os.sched_getaffinity(0)))
    for folder in _cgroups():
        quota = _words(folder / "cpu.max")
        if quota and quota[0].isdigit():
            cores = min(cores, int(quota[0]) / int(quota[1]))
    wanted = patient.config.runtime.num_threads if patient.config else None
    where, threads = "runtime.num_threads", wanted
    if threads is None:
        where, asked = "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        threads = int(asked) if asked.isdigit() else None
    told = f"{where}={threads}" if threads is not None else "threads: torch's choice"
    text = f"{cores:g} of {os.cpu_count()} cores for this process, {told}"
    counted = threads if threads is not None else len(os.sched_getaffinity(0))
    if counted > cores:
        found = f"{text}: {counted} threads on {cores:g} cores wait for one another"
        yield Finding("warn", found, f"set runtime.num_threads={max(int(cores), 1)}")
    else:
        yield Finding("ok", text)


def check_open_files(patient: Patient) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < NUM_FILES:
        yield Finding("warn", f"only {limit} files may be open at once", f"`ulimit -n {NUM_FILES}` before the command")
    else:
        yield Finding(
            "ok", f"{'any number of' if limit == resource.RLIM_INFINITY else limit} files may be open at once"
        )


def check_text(patient: Patient) -> Iterator[Finding]:
    """UTF-8 for file names and for what is printed."""
    names = {sys.getfilesystemencoding(), locale.getpreferredencoding(False), sys.stdout.encoding}
    wrong = sorted(name for name in names if name.lower().replace("-", "") != "utf8")
    if wrong:
        found = f"text is written in {', '.join(wrong)}, not UTF-8: other letters in rows and answers cannot be printed"
        yield Finding("warn", found, "`export LC_ALL=C.UTF-8`, or PYTHONUTF8=1")
    else:
        yield Finding("ok", "UTF-8")


def check_clock(patient: Patient) -> Iterator[Finding]:
    """The time of day against the last commit's: a clock that is behind breaks TLS, and ages and orders of runs."""
    command = ["git", "log", "-1", "--format=%ct"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=10)
    now = time.strftime("%Y-%m-%d %H:%M %z")
    if done.returncode == 0 and time.time() < int(done.stdout) - SLACK_SECONDS:
        yield Finding("warn", f"{now}, which is before the last commit", "set the clock (`timedatectl set-ntp true`)")
    else:
        yield Finding("ok", now)
