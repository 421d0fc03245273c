"""`hydra/launcher=local|fused|ray|slurm` and `hydra/sweeper=grid`: thin doors to `pipeline.sweeps`. No torch import.

A launcher here trains and evaluates every point in processes of its own, whatever the task is that `-m` was given to.
"""

import os
import shlex
import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from pipeline.jobs import Backend
    from pipeline.sweeps import SweepRun

STAGES = ("train", "point")  # whose `-m` makes sense
HERE = "hydra_plugins.lora_pipeline.launchers"


@dataclass
class PointConf:
    """Attributes:
    num_threads: CPU threads of each process; null: torch's own choice.
    fused: points that can share a base are trained together.
    max_fused: of them in one process, at most.
    """

    num_threads: Optional[int] = None
    fused: bool = False
    max_fused: int = 8


@dataclass
class LocalConf(PointConf):
    """Attributes:
    num_workers: processes at once; null: one a GPU, else one.
    """

    _target_: str = f"{HERE}.LocalLauncher"
    num_workers: Optional[int] = None


@dataclass
class FusedConf(LocalConf):
    fused: bool = True


@dataclass
class RayConf(PointConf):
    """Attributes: see pipeline.ray_backend.RayBackend."""

    _target_: str = f"{HERE}.RayLauncher"
    address: Optional[str] = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    max_retries: int = 3
    stop_seconds: float = 120.0


@dataclass
class SlurmConf(PointConf):
    """Attributes: see pipeline.slurm_backend.SlurmBackend."""

    _target_: str = f"{HERE}.SlurmLauncher"
    partition: Optional[str] = None
    timeout_min: int = 240
    gpus_per_node: int = 1
    cpus_per_task: int = 4
    mem_gb: float = 32.0
    account: Optional[str] = None
    qos: Optional[str] = None
    constraint: Optional[str] = None
    num_workers: int = 16
    max_num_timeout: int = 10
    signal_delay_s: int = 90
    setup: list[str] = field(default_factory=list)
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    cluster: Optional[str] = None


@dataclass
class GridConf:
    """Attributes:
    params: axes and values by key, as on the command line, which has the last word.
    """

    _target_: str = f"{HERE}.GridSweeper"
    max_batch_size: Optional[int] = None
    params: Optional[dict[str, str]] = field(default_factory=dict)


for launcher in (LocalConf, FusedConf, RayConf, SlurmConf):
    name = launcher.__name__.removesuffix("Conf").lower()
    ConfigStore.instance().store(group="hydra/launcher", name=name, node=launcher, provider="lora_pipeline")
ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridConf, provider="lora_pipeline")


class PointLauncher(Launcher):
    """What the launchers share; each says with which backend."""

    name: str

    def __init__(self, num_threads: int | None, fused: bool, max_fused: int, **settings: Any):
        self.num_threads, self.fused, self.max_fused = num_threads, fused, max_fused
        self.settings = settings  # of the backend
        self._run: SweepRun | None = None

    @abstractmethod
    def backend(self) -> "Backend":
        """Where the jobs run."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.stage = config, task_function.__name__

    @property
    def run(self) -> "SweepRun":
        from pipeline.errors import ConfigError
        from pipeline.sweeps import SweepRun

        if self.stage not in STAGES:
            raise ConfigError(f"stages.{self.stage} -m: sweep with `python -m stages.train -m`, which evaluates, too.")
        if self._run is None:
            threads = [] if self.num_threads is None else [f"runtime.num_threads={self.num_threads}"]
            command = shlex.join(["python", "-m", f"stages.{self.stage}", *sys.argv[1:]])
            folder = Path(os.path.relpath(self.config.hydra.sweep.dir))
            self._run = SweepRun(folder, command, self.name, self.backend(), self.fused, self.max_fused, threads)
        return self._run

    @property
    def num_workers(self) -> int:
        return self.run.backend.count()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Brings the points to their ends; a job's return value is its point's folder, whatever became of it."""
        folders = self.run.launch([list(overrides) for overrides in job_overrides], initial_job_idx)
        return [
            JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=str(folder))
            for overrides, folder in zip(job_overrides, folders, strict=True)
        ]

    def finish(self) -> None:
        """To be called once, when all points are done. Raises: SystemExit: a point failed."""
        self.run.finish()


class LocalLauncher(PointLauncher):
    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.name = "fused" if self.fused else "local"

    def backend(self) -> "Backend":
        from pipeline.local_backend import LocalBackend

        return LocalBackend(
            self.settings["num_workers"], self.num_threads, str(self.config.runtime.device) in ("cpu", "Device.cpu")
        )


class RayLauncher(PointLauncher):
    name = "ray"

    def backend(self) -> "Backend":
        from pipeline.ray_backend import RayBackend

        return RayBackend(**self.settings)


class SlurmLauncher(PointLauncher):
    name = "slurm"

    def backend(self) -> "Backend":
        from pipeline.slurm_backend import SlurmBackend

        plain = OmegaConf.to_container(OmegaConf.create(self.settings))
        assert isinstance(plain, dict)
        return SlurmBackend(**{str(key): value for key, value in plain.items()})


class GridSweeper(BasicSweeper):
    """Every combination. Unlike Hydra's own, a combination that cannot be fails alone, and the exit code tells."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """The launcher says of each point what is wrong with it."""

    def sweep(self, arguments: list[str]) -> Any:
        from pipeline.config import check_overrides, clean_errors
        from pipeline.errors import Interrupted

        with clean_errors("sweep"):
            if self.params:  # without them the stage's entry has checked all that there is
                check_overrides([*(f"{key}={value}" for key, value in self.params.items()), *arguments], "run")
            try:
                found = super().sweep(arguments)
            except KeyboardInterrupt as error:
                folder = os.path.relpath(self.config.hydra.sweep.dir)
                raise Interrupted(
                    f"{str(error) or 'interrupted.'} Add hydra.sweep.dir={folder} to go on in this folder."
                ) from None
            self.launcher.finish()
            return found
