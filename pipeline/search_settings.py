"""What a search is asked for: how many trials, by what means, and the number that decides."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.files import read_json
from pipeline.pruning import PRUNERS
from pipeline.scoring import METRICS

SAMPLERS = ("tpe", "random")
VALIDATION_LOSS = "train.validation_loss"


@dataclass(frozen=True)
class SearchSettings:
    """What `hydra.sweeper` says.

    Attributes:
        n_trials: of the study, those of earlier runs counted.
        n_parallel: points trained at once.
        objective: `train.validation_loss` or `evaluate.adapter.SCORE`; the score knows whether higher is better.
        pruner_min_steps: no point is pruned before this optimizer step.
        storage: a database URL; None: a journal file in the sweep's folder.
    """

    n_trials: int
    n_parallel: int
    seed: int
    sampler: str
    pruner: str
    pruner_min_steps: int
    objective: str
    storage: str | None = None

    def __post_init__(self) -> None:
        """Raises: ConfigError: all problems in one message."""
        scores = [VALIDATION_LOSS, *(f"evaluate.adapter.{name}" for name in METRICS)]
        found = [
            f"hydra.sweeper.{name}={getattr(self, name)}: there are {', '.join(choices)}"
            for name, choices in (("sampler", SAMPLERS), ("pruner", PRUNERS), ("objective", scores))
            if getattr(self, name) not in choices
        ] + [
            f"hydra.sweeper.{name}={getattr(self, name)}: must be {least} or more"
            for name, least in (("n_trials", 1), ("n_parallel", 1), ("pruner_min_steps", 1), ("seed", 0))
            if getattr(self, name) < least
        ]
        if found:
            raise ConfigError("\n".join(found))

    @property
    def maximize(self) -> bool:
        return self.objective != VALIDATION_LOSS and METRICS[self.objective.rpartition(".")[2]].higher_is_better

    def read_objective(self, folder: Path) -> float:
        """The finished point's value. Raises: ConfigError: it was not measured."""
        stage, *keys = self.objective.split(".")
        path = folder / "metrics" / f"{stage}.json"
        value = read_json(path)
        for key in keys[:-1]:
            value = value[key]
        if not isinstance(value.get(keys[-1]), int | float):
            raise ConfigError(
                f"hydra.sweeper.objective={self.objective} was not measured: {path} has {', '.join(sorted(value))}. "
                "Choose one of these (scores of answers need evaluate.generate=true)."
            )
        return float(value[keys[-1]])
