"""Whether the best setting lies on the edge of the grid, and the command of the sweep that goes on there."""

import copy
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from pipeline.compare_judged import Judged
from pipeline.compare_points import text_of
from pipeline.config import to_settings
from pipeline.errors import ConfigError
from pipeline.points import Sweep
from pipeline.pruning import TRIAL

FOLDER = "hydra.sweep.dir="
WIDER = "_wider"  # at the end of the name of a sweep's folder


@dataclass(frozen=True)
class Edge:
    """A numeric axis on whose end the best setting lies.

    Attributes:
        value: the best setting's; `beyond`: the next one in its direction, at the grid's own step.
        is_flat: a setting with another value there is not shown to be worse.
        command: of the same sweep with `beyond`, in another folder; what was trained comes from the store.
    """

    key: str
    title: str
    value: float
    values: list[float]
    is_highest: bool
    is_flat: bool
    beyond: float
    command: str

    def __str__(self) -> str:
        end, grid = "highest" if self.is_highest else "lowest", ", ".join(map(text_of, self.values))
        but = "; but it is not shown to be better than others inside" if self.is_flat else ""
        return (
            f"edge of the grid: {self.title}={text_of(self.value)} is the {end} of {grid}, and better ones may lie "
            f"beyond{but}. Only what is new is trained by:"
        )


def find_edges(judged: Judged, sweep: Sweep) -> list[Edge]:
    """The axes with two numbers or more on whose end the best setting lies, where a value beyond is a valid one.

    A search has none: it was not told a grid. Neither has an axis on which a value further out was tried and failed.
    """
    if any((sweep.folder / name / TRIAL).exists() for name in sweep.points):
        return []
    best = judged.settings[judged.best]
    found = []
    for key, title in zip(judged.group.axes, judged.group.titles, strict=True):
        grid = sweep.axes.get(key, [])
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in grid):
            continue
        values, value = sorted(set(grid)), best.swept.get(key)
        if len(values) < 2 or value not in (values[0], values[-1]):
            continue
        beyond = _beyond(values if value == values[-1] else values[::-1])
        if not _is_valid(best.any_point.settings, key, beyond):
            continue
        is_flat = any(judged.settings[i].swept.get(key) != value for i in judged.equals)
        command = _command(sweep, key, [*grid, beyond])
        found.append(Edge(key, title, value, values, value == values[-1], is_flat, beyond, command))
    return found


def _beyond(values: Sequence[float]) -> float:
    """What follows the last value: by its ratio to the one before where all are above 0, else by the difference."""
    before, last = values[-2:]
    exact = last * last / before if min(values) > 0 else 2 * last - before
    rounded = round(exact) if all(isinstance(value, int) for value in values) else float(f"{exact:.3g}")
    return exact if rounded == last and isinstance(rounded, float) else rounded


def _is_valid(settings: dict[str, Any], key: str, value: float) -> bool:
    changed = OmegaConf.create(copy.deepcopy(settings))
    OmegaConf.update(changed, key, value)
    try:
        to_settings(changed)
    except ConfigError:
        return False
    return True


def _command(sweep: Sweep, key: str, values: Sequence[float]) -> str:
    axis = f"{key}={','.join(map(str, values))}"
    words = [
        axis if word.startswith(f"{key}=") else word + WIDER if word.startswith(FOLDER) else word
        for word in shlex.split(sweep.command)
    ]
    return shlex.join(words if axis in words else [*words, axis])  # an axis of a file: the command line has the word
