"""Seeded choices, numbers in words and dates, shared by both grammars.

Python promises that `random.Random(seed).random()` gives the same numbers in
every version, but promises less for `choice`, `shuffle` and the like. `Rng`
therefore builds everything on `random()`, so that the data sets come out byte
for byte the same anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def word_list(text: str) -> tuple[str, ...]:
    """Returns the words of a text; long lists read better as text."""
    return tuple(text.split())


MONTHS = word_list("""
    January February March April May June July August September October November December
""")

_UNITS = word_list("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen
""")
_TENS = word_list("""
    zero ten twenty thirty forty fifty sixty seventy eighty ninety
""")


class Rng:
    """A random source whose every answer is derived from `random()` alone."""

    def __init__(self, seed: int) -> None:
        """Seeds the source.

        Args:
            seed: Any whole number; equal seeds give equal answers.
        """
        self._random = random.Random(seed)

    def below(self, limit: int) -> int:
        """Returns a whole number from 0 up to, not including, `limit`."""
        return int(self._random.random() * limit)

    def between(self, low: int, high: int) -> int:
        """Returns a whole number from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        """Returns True with the given probability."""
        return self._random.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        """Returns one of the options."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """Returns `count` different options in random order."""
        pool = list(options)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]


def in_words(number: int) -> str:
    """Spells a whole number below one million, for example "two hundred and five"."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return _TENS[tens] + (f"-{_UNITS[rest]}" if rest else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{_UNITS[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    joint = " and " if rest < 100 else " "
    return f"{in_words(thousands)} thousand" + (f"{joint}{in_words(rest)}" if rest else "")


def ordinal(number: int) -> str:
    """Returns "1st", "22nd", "13th" and so on."""
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"


def capitalise(text: str) -> str:
    """Makes the first letter a capital and leaves the others alone."""
    return text[:1].upper() + text[1:]
