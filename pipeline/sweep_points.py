"""From the overrides of a sweep's points to their typed settings, axes and commands."""

import copy
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config import compose_unresolved, explain, parse_overrides, schema_keys, to_settings
from pipeline.errors import ConfigError, PipelineError
from pipeline.points import Point, State

LEAVES = {key for key in schema_keys() if "." in key}


class Composer:
    """Composes many points quickly: what they share is composed once, values are put into copies of it."""

    def __init__(self, config_name: str = "run"):
        self.config_name = config_name
        self._composed: dict[tuple[str, ...], DictConfig] = {}  # by everything that is not a plain value

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """What `pipeline.config.compose` gives for these overrides.

        Raises:
            ConfigError: an unknown choice, or a wrong type.
        """
        parsed = parse_overrides(overrides)
        values = [item for item in parsed if item.key_or_group in LEAVES and item.type.name == "CHANGE"]
        others = tuple(str(item.input_line) for item in parsed if item not in values)
        try:
            if others not in self._composed:
                self._composed[others] = compose_unresolved(others, self.config_name)
            config = copy.deepcopy(self._composed[others])
            for item in values:
                OmegaConf.update(config, item.key_or_group, item.value())
            OmegaConf.resolve(config)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error)) from None
        return config


def make_points(
    folder: Path,
    all_overrides: Sequence[Sequence[str]],
    first: int,
    runtime: Sequence[str],
    composer: Composer,
    searched: Sequence[str] | None = None,
) -> list[Point]:
    """A point for each list of overrides; where they are no valid settings, it has failed and says why.

    Args:
        first: number of the first point.
        runtime: overrides of `runtime` that all points get and that are no part of their commands.
        searched: the keys that vary; None: those that take more than one value here.
    """
    axes = find_axes(all_overrides) if searched is None else searched
    points = []
    for number, overrides in enumerate(all_overrides, first):
        chosen = dict(zip(_keys(overrides), parse_overrides(overrides), strict=True))
        swept = {key: chosen[key].value() for key in axes if key in chosen}
        command = shlex.join(["python", "-m", "stages.point", *overrides])
        point = Point(folder / f"{number:03d}", number, list(overrides), swept, command)
        try:
            _check_runtime(overrides)
            settings = to_settings(composer.compose([*overrides, *runtime, f"runtime.output_dir={point.folder}"]))
            point.settings = dataclasses.asdict(settings)
            point.swept = {key: _composed(point.settings, key, value) for key, value in swept.items()}
        except PipelineError as error:
            point.state, point.reason = State.failed, str(error)
        points.append(point)
    return points


def _check_runtime(overrides: Sequence[str]) -> None:
    """Raises: ConfigError: a setting of the machine that a point has no use for."""
    ignored = [line for line in overrides if line.startswith(("runtime.inputs_dir", "runtime.output_dir"))]
    if ignored:
        raise ConfigError(
            f"{ignored[0]}: a sweep finds or makes the inputs of its points, and gives them their folders"
        )


def find_axes(all_overrides: Sequence[Sequence[str]]) -> dict[str, list[Any]]:
    """The keys that take more than one value, with these, in the order of their first use."""
    values: dict[str, list[Any]] = {}
    for overrides in all_overrides:
        for key, override in zip(_keys(overrides), parse_overrides(overrides), strict=True):
            value = override.value()
            if value not in values.setdefault(key, []):
                values[key].append(value)
    return {key: found for key, found in values.items() if len(found) > 1}


def _keys(overrides: Sequence[str]) -> list[str]:
    return [item.key_or_group for item in parse_overrides(overrides)]


def _composed(settings: dict[str, Any], key: str, given: Any) -> Any:
    """The key's value as composed (`5e-3` is 0.005); of a group, its choice."""
    value: Any = settings
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return given
        value = value[part]
    return given if isinstance(value, dict) else value
