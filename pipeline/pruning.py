"""Stopping hopeless points early: the head's note in a point's folder, and the worker's question at each validation.

A point of an optuna search has `trial.json` in its folder, which says where its trial is kept. The worker reports
each validation loss there and is told whether to go on, by what other points had at the same step.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import ConfigError
from pipeline.files import read_json, write_json

logger = logging.getLogger(__name__)
TRIAL = "trial.json"
JOURNAL = "optuna.journal"
PRUNERS = ("none", "median", "hyperband")
STARTUP_TRIALS = 5  # finished ones that the median is taken of, at least
INSTALL = "optuna is not installed. Install it with: pip install -c constraints.txt -e '.[sweep]'"


def import_optuna() -> Any:
    """The package, its own log silenced. Raises: ConfigError: it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError(INSTALL) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_storage(address: str) -> Any:
    """Optuna's storage at a database URL, or in a journal file (made for several processes, on a network disk too).

    Raises:
        ConfigError: a password in the URL, which would end in files; or the database cannot be used.
    """
    optuna = import_optuna()
    if "://" not in address:
        journal = optuna.storages.journal
        return optuna.storages.JournalStorage(journal.JournalFileBackend(address, journal.JournalFileOpenLock(address)))
    if urlsplit(address).password:
        raise ConfigError(
            "hydra.sweeper.storage: a password in the URL would be written into files. Give it as the database's "
            "client takes it (PostgreSQL: PGPASSWORD or ~/.pgpass)."
        )
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return optuna.storages.RDBStorage(address)
    except (SQLAlchemyError, ImportError, optuna.exceptions.OptunaError) as error:
        raise ConfigError(
            f"hydra.sweeper.storage={address} cannot be used: {str(error).splitlines()[0]}. Leave it out for a file in "
            "the sweep's folder."
        ) from None


def make_pruner(name: str, min_steps: int) -> Any:
    """Optuna's pruner; none of them prunes before optimizer step `min_steps`.

    median: worse than the median of the others at this step, once 5 have finished (Golovin et al. 2017, Vizier).
    hyperband: successive halving in several brackets, by 3 (Li et al. 2018, JMLR 18-185).
    """
    pruners = import_optuna().pruners
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=min_steps)
    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=min_steps, reduction_factor=3)
    return pruners.NopPruner()


def write_trial(folder: Path, study: Any, trial: Any, storage: str, pruner: str, min_steps: int) -> None:
    """Tells the worker of this point where its trial is."""
    values = {"storage": storage, "study": study.study_name, "trial_id": trial._trial_id, "number": trial.number}
    write_json(folder / TRIAL, {**values, "pruner": pruner, "min_steps": min_steps})


def pruner_for(folder: Path, last_step: int | None = None) -> Callable[[int, float], bool] | None:
    """What a point's training asks at each validation, with the optimizer step and the loss (nats a supervised token).

    It answers True where the point is hopeless. A step that was reported before (a resumed training tells its history
    again) is not reported twice. Where the study is maximized (a task score), the loss is reported with its sign
    turned, so that higher is better in both. A storage that fails is said once, and nothing is pruned from there on.

    Args:
        last_step: of the training; there the answer is False, since giving up would save nothing.

    Returns:
        None: the point belongs to no search.

    Raises:
        ConfigError: optuna is not installed, or its storage cannot be used.
        DataError: `trial.json` is damaged.
    """
    if not (folder / TRIAL).exists():
        return None
    optuna, note = import_optuna(), read_json(folder / TRIAL)
    pruner = make_pruner(note["pruner"], note["min_steps"])
    study = optuna.load_study(study_name=note["study"], storage=open_storage(note["storage"]), pruner=pruner)
    trial = optuna.trial.Trial(study, note["trial_id"])
    reported = set(study.trials[note["number"]].intermediate_values)
    sign = -1.0 if study.direction is optuna.study.StudyDirection.MAXIMIZE else 1.0
    works = True

    def is_hopeless(step: int, loss: float) -> bool:
        nonlocal works
        if not works:
            return False
        try:
            if step not in reported:
                reported.add(step)
                trial.report(sign * loss, step)
            return step != last_step and bool(trial.should_prune())
        except (OSError, ValueError, optuna.exceptions.OptunaError) as error:  # ValueError: a torn journal
            works = False
            logger.warning("%s: not pruned from step %d on: the study cannot be reached (%s)", folder, step, error)
            return False

    return is_hopeless
