"""Why a stage refuses to start: the doctor's quick checks (no network, no trial), and which stages each stops.

Every stage depends on this file alone of the doctor's. It is read by Pythons that are too old to run the rest.
"""

import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.schema import ModelConfig, RunConfig

ROOT = Path(__file__).resolve().parent.parent
DEVICES = Path("/dev")
REMEDY = f"`{sys.executable} -m pip install -r constraints.txt`"
FLOOR_BYTES = 200_000_000  # outputs of the smallest model, its records and MLflow's
Status = Literal["ok", "warn", "fail"]


class RefusalError(PipelineError, RuntimeError):
    """A machine or an environment on which a stage must not start."""


@dataclass(frozen=True)
class Finding:
    """Attributes:
    remedy: what to do; empty for `ok`.
    name: of the check.
    """

    status: Status
    found: str
    remedy: str = ""
    name: str = ""


@dataclass(frozen=True)
class Patient:
    """What is looked at.

    Attributes:
        config: None where the settings themselves are wrong.
        stage: the one that asks; None: the doctor, for all of them.
        choices: Hydra's, by group, such as `hydra/launcher`: `local`.
    """

    config: "RunConfig | None"
    stage: str | None = None
    choices: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Check:
    """Attributes:
    run: its findings, at least one where it looked at something.
    stages: those that refuse to start on its `fail`.
    """

    name: str
    run: Callable[[Patient], Iterator[Finding]]
    stages: tuple[str, ...] = ()


_ALL = ("hydra-core", "omegaconf", "pyyaml", "psutil", "numpy")
_SCORES = ("scipy", "sacrebleu", "rouge-score")
_MODEL = (*_ALL, "torch", "transformers", "safetensors", "huggingface-hub", "pyarrow", "jinja2", "tqdm")
_BASE = (*_MODEL, "accelerate", "bitsandbytes")
# What each stage imports. Not MLflow and DVC: tracking stops no stage, and by hand a stage runs without DVC.
STAGE_PACKAGES: dict[str, tuple[str, ...]] = {
    "prepare": (*_MODEL, "datasets"),
    "quantize": _BASE,
    "train": (*_BASE, "peft", "matplotlib"),
    "evaluate": (*_BASE, "peft", *_SCORES),
    "merge": (*_BASE, "peft", "matplotlib", *_SCORES),
    "point": (*_BASE, "peft", "matplotlib", "datasets", *_SCORES),
    "domains": (*_BASE, "peft", "matplotlib", "datasets", *_SCORES),
    "report": (*_ALL, "pyarrow", "jinja2", "matplotlib", *_SCORES),
    "gate": (*_ALL, *_SCORES),
}
STAGES = tuple(STAGE_PACKAGES)
ON_DEVICE = ("quantize", "train", "evaluate", "merge", "point", "domains")
STORING = ("train", "evaluate", "point", "domains")  # write to `.training` of the project, wherever their outputs go


def refuse(stage: str, config: "RunConfig") -> None:
    """Raises: RefusalError: a check of this stage fails; every one that does, in one message."""
    patient = Patient(config, stage)
    findings = [found for check in CHECKS if stage in check.stages for found in check.run(patient)]
    failed = [f"  {found.found}\n    {found.remedy}" for found in findings if found.status == "fail"]
    if failed:
        raise RefusalError("\n".join(["cannot start here:", *failed, "`python -m pipeline.doctor` checks the rest."]))


def check_python(patient: Patient) -> Iterator[Finding]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    floor = re.search(r'^requires-python = ">=(\d+)\.(\d+)"', text, flags=re.MULTILINE)
    here = ".".join(map(str, sys.version_info[:3]))
    if floor is not None and sys.version_info[:2] < (int(floor[1]), int(floor[2])):
        yield Finding(
            "fail",
            f"Python {here}; the project needs {floor[1]}.{floor[2]} or newer",
            f"`rm -rf .venv && make PYTHON=python{floor[1]}.{floor[2]} params` makes the environment with that one",
        )
    else:
        yield Finding("ok", f"{here} in {sys.prefix}")


def check_packages(patient: Patient) -> Iterator[Finding]:
    """The packages that pyproject.toml asks for: of a stage those that it imports, else all."""
    import tomllib

    from packaging.requirements import Requirement

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    mine = None if patient.stage is None else STAGE_PACKAGES[patient.stage]
    requirements = [r for r in map(Requirement, wanted) if mine is None or r.name in mine]
    failed = False
    for requirement in requirements:
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("fail", f"{requirement.name} is missing (wanted: {requirement.specifier})", REMEDY)
            failed = True
            continue
        version = distribution.version
        if not requirement.specifier.contains(version, prereleases=True):
            where = Path(str(distribution.locate_file(""))).resolve()
            text = f"{requirement.name} {version} in {where} is outside {requirement.specifier}"
            own = where.is_relative_to(Path(sys.prefix).resolve())
            yield Finding(
                "fail", text, REMEDY if own else f"take {where} off PYTHONPATH, or {REMEDY} into a fresh .venv"
            )
            failed = True
    if not failed:
        yield Finding("ok", f"all {len(requirements)} that pyproject.toml asks for are in its ranges")


def check_gpu(patient: Patient) -> Iterator[Finding]:
    """Whether torch uses the GPU that is asked for, or that lies idle unless the CPU was asked for."""
    device = patient.config.runtime.device if patient.config else "auto"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")
    nodes = open_gpus()
    if device == "cpu" or (device == "auto" and (hidden or not nodes)):
        why = "runtime.device=cpu" if device == "cpu" else "hidden by CUDA_VISIBLE_DEVICES" if hidden else "no GPU here"
        yield Finding("ok", f"the CPU: {why}")
        return
    import torch

    if torch.cuda.is_available():
        yield Finding("ok", f"{torch.cuda.get_device_name()}")
        return
    here = f"the GPU {', '.join(nodes)} is there, but" if nodes else "runtime.device=cuda, but"
    if torch.version.cuda is None:
        found = f"{here} torch {torch.__version__} is a CPU build"
        remedy = (
            "install torch's CUDA build (https://pytorch.org/get-started), or set runtime.device=cpu to mean the CPU"
        )
    else:
        found = f"{here} torch {torch.__version__} for CUDA {torch.version.cuda} finds none"
        remedy = "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES: mend or update the driver, or set runtime.device=cpu"
    yield Finding("fail", found, remedy)


def open_gpus() -> list[str]:
    """Device files of NVIDIA GPUs that this process may open (a container or a job without a GPU may not)."""
    found = []
    for path in sorted(DEVICES.glob("nvidia[0-9]*")):
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError:
            continue
        found.append(str(path))
    return found


def check_disk(patient: Patient) -> Iterator[Finding]:
    """Room, inodes and permission where outputs go, and what the stage stores in the project."""
    folders = []
    if patient.stage is None or patient.stage in STORING:
        folders.append(Path(os.environ.get("DVC_ROOT") or ROOT) / ".training")
    if patient.config is not None:
        folders.append(Path(patient.config.runtime.output_dir))
    # of those that can be written, one a disk
    distinct = {f.stat().st_dev if os.access(f, os.W_OK) else f: f for f in map(existing, folders)}
    findings = [check_room(folder, FLOOR_BYTES) for folder in distinct.values()]
    wrong = [finding for finding in findings if finding.status != "ok"]
    yield from wrong or [Finding("ok", "; ".join(finding.found for finding in findings))]


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def check_room(folder: Path, num_bytes: int) -> Finding:
    """Whether the folder can be written and its disk has so many bytes free."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    text = f"{folder}: {free / 1e9:.1f} GB free"
    if not os.access(folder, os.W_OK) or disk.f_flag & os.ST_RDONLY:
        return Finding("fail", f"{folder}: cannot be written", "give this user the right to, or take another folder")
    if not disk.f_blocks:
        return Finding("ok", f"{folder}: its file system does not tell what is free")
    if free < num_bytes:
        return Finding(
            "fail",
            f"{text}, {num_bytes / 1e9:.1f} GB are needed",
            "free some: `dvc gc --workspace` drops old cached outputs, `python -m pipeline.store clean --unfinished` "
            "what is left of trainings, `hf cache prune` old downloads",
        )
    if disk.f_files and not disk.f_favail:
        return Finding("fail", f"{folder}: no inode is free", "remove files: many small ones have used all inodes up")
    return Finding("ok", text)


def check_base(patient: Patient) -> Iterator[Finding]:
    """Offline: whether the cache has the Hub model of the settings."""
    model = patient.config.model if patient.config else None
    if model is None or model.hub_id is None:
        return
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return
    where = f"{model.hub_id} at {model.revision}"
    if is_cached(model):
        yield Finding("ok", f"offline (HF_HUB_OFFLINE); the cache has {where}")
    else:
        yield Finding(
            "fail",
            f"offline (HF_HUB_OFFLINE), and {constants.HF_HUB_CACHE} lacks {where}",
            f"unset HF_HUB_OFFLINE, or fetch it where there is a network: `hf download {model.hub_id} --revision "
            f"{model.revision} --local-dir FOLDER`, bring it here, and set model=local model.path=/absolute/FOLDER",
        )


def is_cached(model: "ModelConfig") -> bool:
    """Whether the Hub's cache has the model's config.json at its revision."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(str(model.hub_id), "config.json", revision=model.revision), str)


CHECKS = (
    Check("python", check_python, STAGES),
    Check("packages", check_packages, STAGES),
    Check("gpu", check_gpu, ON_DEVICE),
    Check("disk", check_disk, STAGES),
    Check("base", check_base, ("prepare", *ON_DEVICE)),
)
