"""`hydra/sweeper=optuna`: each next points of a sweep chosen by those before. No torch import here.

    python -m stages.train -m hydra/sweeper=optuna lora.r=4,8,16 'train.learning_rate=tag(log,interval(1e-4,1e-2))'

Of our own, since hydra-optuna-sweeper 1.3 pins optuna below 3, its storage fails with SQLAlchemy 2.1, and it can
neither prune a point in another process nor go on with a point that was killed.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from hydra_plugins.lora_pipeline.launchers import PointLauncher
    from pipeline.search import Search


@dataclass
class OptunaSweeperConf:
    """`hydra.sweeper` with `hydra/sweeper=optuna`; see pipeline.search_settings.SearchSettings.

    Attributes:
        n_parallel: null: as many as the launcher trains at once.
        sampler: tpe or random.
        pruner: none, median or hyperband, on the validation loss.
        pruner_min_steps: null: twice train.eval_steps.
        params: axes and values by key, as on the command line, which has the last word.
    """

    _target_: str = "hydra_plugins.lora_pipeline.optuna_sweeper.OptunaSweeper"
    n_trials: int = 20
    n_parallel: Optional[int] = None
    seed: int = 0
    sampler: str = "tpe"
    pruner: str = "median"
    pruner_min_steps: Optional[int] = None
    objective: str = "train.validation_loss"
    storage: Optional[str] = None
    params: dict[str, str] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider="lora_pipeline")


class OptunaSweeper(Sweeper):
    """Asks the study for points, has the launcher make them, tells the study; again, until all trials are done."""

    def __init__(self, params: dict[str, str], **settings: Any) -> None:
        self.params, self.settings = params, settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher: PointLauncher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from pipeline.config import clean_errors
        from pipeline.errors import Interrupted

        with clean_errors("sweep"), contextlib.closing(self._open(arguments)) as search:
            try:
                num_points = self._work_through(search)
            except KeyboardInterrupt as error:
                folder = self.config.hydra.sweep.dir
                reason = str(error) or "interrupted."
                raise Interrupted(f"{reason} Add hydra.sweep.dir={folder} to go on in this folder.") from None
            try:
                if num_points:
                    self.launcher.finish()
            finally:  # it exits with 1 where a point failed
                print(*search.finish(), sep="\n")

    def _work_through(self, search: "Search") -> int:
        """The number of points that were launched."""
        from pipeline.errors import Interrupted
        from pipeline.search import consecutive

        num_points = 0
        self.launcher.run.searched = [axis.key for axis in search.space.axes]
        while batch := search.ask():
            for group in consecutive(batch):
                self.launcher.launch([point.overrides for point in group], initial_job_idx=group[0].number)
            num_points += len(batch)
            if not search.tell(batch):
                raise Interrupted("a point was interrupted.")
        return num_points

    def _open(self, arguments: list[str]) -> "Search":
        """The checked settings and space, and their study."""
        from pipeline.config import check_overrides, compose_config
        from pipeline.errors import ConfigError
        from pipeline.search import Search
        from pipeline.search_settings import SearchSettings
        from pipeline.search_space import parse_space

        if not hasattr(self.launcher, "finish"):
            choice = self.config.hydra.runtime.choices["hydra/launcher"]
            raise ConfigError(f"hydra/launcher={choice} makes no points: choose local, fused, ray or slurm.")
        lines = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        space = parse_space(parser.parse_overrides(lines))
        try:
            check_overrides(space.examples(), "run")
        except ConfigError as error:
            hint = "\nWhole numbers between two: lora.r=int(interval(4,64))." if "to Integer" in str(error) else ""
            raise ConfigError(f"{error}{hint}") from None
        settings = dict(self.settings)
        if settings["n_parallel"] is None:
            fused = self.launcher.max_fused if self.launcher.fused else 1
            settings["n_parallel"] = self.launcher.num_workers * fused
        if settings["pruner_min_steps"] is None:
            first = [*space.fixed, *(axis.examples()[0] for axis in space.axes)]
            settings["pruner_min_steps"] = 2 * compose_config(first).train.eval_steps
        folder = Path(self.config.hydra.sweep.dir)
        found = Search(SearchSettings(**settings), space, folder)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        return found
