"""The prepared data and the quantized base that points of a sweep share: made once for each of their settings.

Settings that are the project's own come from DVC: `dvc repro` makes them, or takes them from its cache. Others lie
beside the trainings (`pipeline.shared_results`).
"""

import contextlib
import dataclasses
import fcntl
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import compose, to_settings
from pipeline.errors import DataError, PipelineError
from pipeline.files import hash_once, hash_path
from pipeline.gpu_leases import visible_gpus
from pipeline.imports import ROOT, code_hash
from pipeline.model_files import hash_model, small_files
from pipeline.points import Point
from pipeline.provenance import package_versions
from pipeline.schema import RunConfig
from pipeline.shared_results import make_once
from pipeline.workspace import PROCESSED, QUANTIZED, project_root

logger = logging.getLogger(__name__)
BUSY = ("is busy, it is being blocked by", "Unable to acquire lock")  # what DVC says of another DVC
BUSY_SECONDS = 10.0
TEMPLATES = ROOT / "conf/chat_templates"


@dataclass(frozen=True)
class Inputs:
    """Attributes:
    processed, quantized: the folders.
    """

    processed: Path
    quantized: Path


class SharedInputs:
    """Finds or makes the inputs of points, each once, and keeps them from `pipeline.store clean` until it is closed."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._found: dict[str, Path | PipelineError] = {}
        self._reproduced: set[str] = set()

    def close(self) -> None:
        """Lets go of the inputs; the end of the process does too."""
        self._held.close()

    def of(self, points: Sequence[Point]) -> dict[int, Inputs | PipelineError]:
        """By the points' numbers, their inputs; or why they cannot be made.

        Raises:
            DataError: `dvc repro` fails on the project's own.
        """
        project = to_settings(compose([], "locked"))
        configs = [point.config for point in points]
        targets = ["prepare"] if any(_data(config) == _data(project) for config in configs) else []
        targets += ["quantize"] if any(_base(config) == _base(project) for config in configs) else []
        if set(targets) - self._reproduced:
            _reproduce(targets)
            self._reproduced |= set(targets)
        found: dict[int, Inputs | PipelineError] = {}
        for point in points:
            try:
                found[point.number] = self._of(point, project)
            except PipelineError as error:
                found[point.number] = error
        return found

    def _of(self, point: Point, project: RunConfig) -> Inputs:
        config = point.config
        data = Path()
        if _data(config) != _data(project):
            data = self._make("prepare", _prepare_inputs(config), point, None)
        base = Path()
        if _base(config) != _base(project):
            base = self._make("quantize", _quantize_inputs(config), point, data)
        return Inputs(data / PROCESSED, base / QUANTIZED)

    def _make(self, stage: str, inputs: dict[str, Any], point: Point, source: Path | None) -> Path:
        key = f"{stage} {sorted(inputs.items(), key=str)}"
        if key not in self._found:

            def run(folder: Path) -> None:
                logger.info("%s: for %s", stage, " ".join(point.overrides))
                options = [f"runtime.output_dir={folder}", "runtime.progress=false"]
                options += [f"runtime.inputs_dir={source}"] if source is not None else []
                leased = ["-m", "pipeline.gpu_leases", sys.executable] if visible_gpus() else []
                command = [sys.executable, *leased, "-m", f"stages.{stage}", *point.overrides, *options]
                done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
                if done.returncode:
                    raise DataError(f"{stage}: {(done.stderr or done.stdout).strip()}")

            try:
                self._found[key] = make_once(stage, inputs, run, self._held)
            except PipelineError as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, PipelineError):
            raise found
        return found


def _data(config: RunConfig) -> list[dict[str, Any]]:
    """The settings that prepare reads."""
    return [dataclasses.asdict(config.data), dataclasses.asdict(config.model)]


def _base(config: RunConfig) -> list[dict[str, Any]]:
    """The settings that quantize reads."""
    return [dataclasses.asdict(config.model), dataclasses.asdict(config.quantization)]


def _reproduce(targets: Sequence[str]) -> None:
    """Has DVC make what the project's own settings need; sweeps that start at once take turns."""
    lock = project_root() / ".training" / "dvc.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "dvc", "repro", *targets]
        while True:
            done = subprocess.run(
                command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
            )
            if done.returncode == 0 or not any(text in done.stdout for text in BUSY):
                break
            logger.info("another dvc is at work here: waiting for it")
            time.sleep(BUSY_SECONDS)
    ran = [line for line in done.stdout.splitlines() if line.startswith("Running stage")]
    if done.returncode:
        raise DataError(
            f"`dvc repro {' '.join(targets)}` failed, which makes what all points share:\n{done.stdout.strip()}"
        )
    logger.info("%s: %s", " and ".join(targets), f"made by DVC ({len(ran)} stages ran)" if ran else "as DVC has them")


def _prepare_inputs(config: RunConfig) -> dict[str, Any]:
    return {
        "settings": _data(config),
        "files": [hash_once(path) for path in map(Path, (config.data.path, config.data.general_path)) if path.exists()],
        "templates": hash_path(TEMPLATES),
        "tokenizer": small_files(config.model),
        "code": code_hash("stages.prepare"),
        "versions": package_versions(),
    }


def _quantize_inputs(config: RunConfig) -> dict[str, Any]:
    return {
        "settings": _base(config),
        "base": hash_model(config.model),
        "tokenizer": small_files(config.model),
        "code": code_hash("stages.quantize"),
        "versions": package_versions(),
    }
