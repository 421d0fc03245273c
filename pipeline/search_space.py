"""The space of a search, as Hydra's override grammar gives it: which keys vary, and over what.

lora.r=4,8,16   lora=glob(*)            one of these; three numbers or more keep their order
lora.r=range(4,65,4)                    a whole number; the stop is not included
train.learning_rate=interval(1e-4,1e-2)         a number between these
train.learning_rate=tag(log,interval(1e-4,1e-2))    the same, on a log scale
lora.r=int(tag(log,interval(4,64)))     a whole number, the end included; tag(int,log,interval(4,64)) is the same
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Choices:
    """One of several values.

    Attributes:
        texts: the values as an override writes them.
        ordered: they are numbers, ascending: neighbours are more alike than others.
    """

    key: str
    texts: tuple[str, ...]
    ordered: bool

    @property
    def size(self) -> int:
        return len(self.texts)

    def suggest(self, trial: Any) -> str:
        """The trial's value. Ordered ones are searched by their place, which optuna 5 cannot know of a category."""
        if self.ordered:
            return self.texts[trial.suggest_int(f"{self.key}_index", 0, self.size - 1)]
        return str(trial.suggest_categorical(self.key, self.texts))

    def examples(self) -> list[str]:
        return [f"{self.key}={text}" for text in self.texts]


@dataclass(frozen=True)
class Interval:
    """A number from `low` to `high`, both included; a whole number where they are ints, `step` apart."""

    key: str
    low: int | float
    high: int | float
    step: int = 1
    log: bool = False

    @property
    def size(self) -> int | None:
        """How many values there are; None: a float, without number."""
        return (self.high - self.low) // self.step + 1 if isinstance(self.high, int) else None  # type: ignore[return-value]

    def suggest(self, trial: Any) -> str:
        """The trial's value, at full precision."""
        if isinstance(self.low, int):
            return str(trial.suggest_int(self.key, self.low, self.high, step=self.step, log=self.log))
        return repr(trial.suggest_float(self.key, self.low, self.high, log=self.log))

    def examples(self) -> list[str]:
        """Both ends and, of floats, one between that is no whole number."""
        between = [] if isinstance(self.low, int) else [self.low + (self.high - self.low) / math.pi]
        return [f"{self.key}={value!r}" for value in (self.low, *between, self.high)]


@dataclass(frozen=True)
class Space:
    """Attributes:
    fixed: overrides that every point has.
    lines: all overrides as they were given, one a key.
    """

    fixed: tuple[str, ...]
    axes: tuple[Choices | Interval, ...]
    lines: tuple[str, ...]

    @property
    def size(self) -> int | None:
        """The number of different points; None: one axis or more is a float."""
        sizes = [axis.size for axis in self.axes]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    def suggest(self, trial: Any) -> list[str]:
        """The overrides of the trial's point."""
        return [*self.fixed, *(f"{axis.key}={axis.suggest(trial)}" for axis in self.axes)]

    def examples(self) -> list[str]:
        """A sweep over values of each axis (of an interval the ends and one between), to be checked before it runs."""
        listed = [[text.partition("=")[2] for text in axis.examples()] for axis in self.axes]
        return [*self.fixed, *(f"{axis.key}={','.join(v)}" for axis, v in zip(self.axes, listed, strict=True))]


def parse_space(overrides: Sequence[Override]) -> Space:
    """The space of these overrides; of two with the same key the later one counts.

    Raises:
        ConfigError: an axis that cannot be searched, or none at all; all problems in one message.
    """
    last = {override.get_key_element(): override for override in overrides}
    fixed, axes, found = [], [], []
    for override in last.values():
        if not override.is_sweep_override():
            fixed.append(override.input_line or "")
            continue
        try:
            axes.append(parse_axis(override))
        except ConfigError as error:
            found.append(str(error))
    if not last or not (axes or found):
        found.append(
            "no key has several values, so there is nothing to search. Give an axis, such as lora.r=4,8,16 or "
            "'train.learning_rate=tag(log,interval(1e-4,1e-2))', or an experiment that has axes."
        )
    if found:
        raise ConfigError("\n".join(found))
    return Space(tuple(fixed), tuple(axes), tuple(override.input_line or "" for override in last.values()))


def parse_axis(override: Override) -> Choices | Interval:
    """Raises: ConfigError: no such axis can be searched."""
    key, sweep = override.get_key_element(), override.value()
    tags = set(getattr(sweep, "tags", ()))
    unknown = tags - {"log", "int"}
    if unknown:
        raise ConfigError(
            f"{override.input_line}: tag {', '.join(sorted(unknown))} means nothing here; there are: log, int"
        )
    if isinstance(sweep, IntervalSweep):
        return _interval(override, sweep, tags)
    if isinstance(sweep, RangeSweep) and all(isinstance(v, int) for v in (sweep.start, sweep.stop, sweep.step)):
        values = sorted(sweep.range())
        if values and not ("log" in tags and (abs(int(sweep.step)) != 1 or values[0] < 1)):
            return Interval(key, values[0], values[-1], abs(int(sweep.step)), "log" in tags)
        raise ConfigError(
            f"{override.input_line}: the range is empty"
            if not values
            else f"{override.input_line}: a log scale needs a range from 1 or more, in steps of 1"
        )
    if tags:
        raise ConfigError(
            f"{override.input_line}: tags are for interval(a,b), and log for a range of whole numbers too"
        )
    texts = list(dict.fromkeys(override.sweep_string_iterator()))
    if not texts:
        raise ConfigError(f"{override.input_line}: no value fits; look at `conf/` for the names")
    raw = (
        sweep.list
        if isinstance(sweep, ChoiceSweep)
        else texts
        if not isinstance(sweep, RangeSweep)
        else list(sweep.range())
    )
    ordered = len(texts) > 2 and all(isinstance(value, int | float) and not isinstance(value, bool) for value in raw)
    return Choices(key, tuple(sorted(texts, key=float) if ordered else sorted(texts)), ordered)


def _interval(override: Override, sweep: IntervalSweep, tags: set[str]) -> Interval:
    low, high = sweep.start, sweep.end
    assert low is not None
    assert high is not None
    problem = None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        problem = "the first end must be below the second"
    elif "log" in tags and low <= 0:
        problem = "a log scale needs ends over 0"
    elif "int" in tags and (low != int(low) or high != int(high)):
        problem = "the ends of whole numbers are whole numbers"
    if problem:
        raise ConfigError(f"{override.input_line}: {problem}")
    if "int" in tags or isinstance(low, int):
        return Interval(override.get_key_element(), int(low), int(high), log="log" in tags)
    return Interval(override.get_key_element(), float(low), float(high), log="log" in tags)
