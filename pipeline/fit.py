"""The memory plan as the stages see it: a check before the base is fetched or loaded, and a figure beside the measured.

`pipeline.fit_check` and what it plans with are imported by name: they decide whether a stage runs, not what it writes,
so they are no code deps of it, and a better plan rebuilds nothing.
"""

import importlib
from pathlib import Path
from typing import Any

from pipeline.schema import OnMisfit, RunConfig


def check_fit(config: RunConfig, processed: Path | None = None, loads_base: bool = False) -> None:
    """Stops, or warns, as `runtime.on_misfit` says, where the training is planned to take more memory than is free.

    Args:
        processed: the folder of processed data; None before there is one: rows are counted as `data.max_length`, all
            of the device's memory counts as free.
        loads_base: without them, that the stage fetches and loads the base right after this. Else, and without a
            `runtime.device`, it only warns: another machine may be meant.

    Raises:
        ConfigError: it cannot fit, or settings that the model does not have; says what would fit.
        ModelError: a config.json that cannot be used, or fetched.
    """
    if config.runtime.on_misfit is not OnMisfit.ignore:
        _fit_check().check_fit(config, processed, loads_base)


def planned_bytes(config: RunConfig, processed: Path) -> int | None:
    """The planned peak of one process above what is taken before the base is loaded, for the rows that there are.

    None with `runtime.on_misfit=ignore`, or where no plan could be made (logged); it raises nothing.
    """
    planned: int | None = None
    if config.runtime.on_misfit is not OnMisfit.ignore:
        planned = _fit_check().planned_bytes(config, processed)
    return planned


def _fit_check() -> Any:
    return importlib.import_module("pipeline.fit_check")
