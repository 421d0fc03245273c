"""Builds one legalese clause together with its plain-English summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import contract_words as words
from contract_shapes import SHAPES, Shape
from grammar_tools import MONTHS, Rng, capitalise, in_words, ordinal


@dataclass(frozen=True)
class Fact:
    """One slot of a clause: how the legalese puts it and how the summary does."""

    legal: str
    plain: str


class ClauseMaker:
    """Draws clauses for one split.

    Attributes:
        held_out_wordings: How many clauses so far used any held-out wording.
        held_out_shapes: How many clauses so far had a held-out exception to their kind.
    """

    def __init__(self, rng: Rng, name_starts: Sequence[str], held_out_rate: float) -> None:
        """Prepares a maker.

        Args:
            rng: Source of all choices.
            name_starts: First halves of the party names of this split.
            held_out_rate: Probability with which each wording is the held-out one;
                above 0, held-out exceptions are drawn like the others.
        """
        self._rng = rng
        self._name_starts = name_starts
        self._held_out_rate = held_out_rate
        self._used_held_out = False
        self.held_out_wordings = 0
        self.held_out_shapes = 0

    def make(self) -> dict[str, str]:
        """Returns one row with the keys `instruction`, `input` and `output`."""
        rng = self._rng
        self._used_held_out = False
        shape = SHAPES[rng.pick(tuple(SHAPES))]
        plain_slots, legal_slots = self._slots(shape)

        main = self._wording(shape.wordings)
        summary = shape.plain
        if shape.exceptions and rng.chance(0.4):
            exception = rng.pick(shape.exceptions if self._held_out_rate else shape.exceptions[:-1])
            self.held_out_shapes += exception == shape.exceptions[-1]
            meaning, wordings = words.EXCEPTIONS[exception]
            wording = self._wording(wordings)
            main = f"{wording}, {main}" if rng.chance(0.4) else f"{main}, {wording}"
            summary = f"{summary}, {meaning}"
        sentences = [rng.pick(words.OPENERS) + main + "."]
        summary += "."
        if shape.consequences and rng.chance(0.2):
            meaning, wordings = words.CONSEQUENCES[rng.pick(shape.consequences)]
            sentences.append(self._wording(wordings))
            summary += f" {meaning}"
        if rng.chance(0.25):
            # Never between the two sentences that belong together.
            sentences.insert(len(sentences) * rng.below(2), rng.pick(words.DISTRACTORS))

        # Slots come before capitals: a sentence may begin with one ("the Supplier shall").
        body = " ".join(capitalise(sentence.format(**legal_slots)) for sentence in sentences)
        self.held_out_wordings += self._used_held_out
        return {
            "instruction": rng.pick(words.INSTRUCTIONS),
            "input": legal_slots["introduction"] + body,
            "output": capitalise(summary.format(**plain_slots)),
        }

    def _wording(self, wordings: Sequence[str]) -> str:
        """Picks a wording; the last of them only at the held-out rate."""
        if self._rng.chance(self._held_out_rate):
            self._used_held_out = True
            return wordings[-1]
        return self._rng.pick(wordings[:-1])

    def _slots(self, shape: Shape) -> tuple[dict[str, str], dict[str, str]]:
        """Draws all facts and returns their plain and their legal values by slot."""
        rng = self._rng
        first, second, other = self._party(), self._party(), self._party()
        while second == first:
            second = self._party()
        role_first, role_second = rng.pick(shape.roles)
        introduction = self._wording(words.INTRODUCTIONS)
        legal_first, legal_second = (f"the {role_first}", f"the {role_second}") if introduction else (first, second)
        percent = rng.between(2, 18)
        count = rng.between(2, 95) * 10
        facts = {
            "A": Fact(legal_first, first),
            "B": Fact(legal_second, second),
            "amount": self._amount(),
            "small": self._amount(),
            "penalty": self._amount(),
            "other_amount": self._amount(),
            "date": self._date(),
            "other_date": self._date(),
            "period": self._period(shape.units),
            "term": self._period((("years", 2, 9), ("months", 6, 24))),
            "when": self._when(),
            "thing": self._same(rng.pick(shape.things)),
            "count": Fact(f"{in_words(count)} ({count})" if rng.chance(0.5) else str(count), str(count)),
            "percent": self._same(str(percent)),
            "percent_words": self._same(in_words(percent)),
            "number": self._same(f"{rng.between(1, 30)}.{rng.between(1, 9)}"),
            "other_party": self._same(other),
        }
        legal = {slot: fact.legal for slot, fact in facts.items()}
        legal["introduction"] = introduction.format(a=first, b=second, role_a=role_first, role_b=role_second)
        return {slot: fact.plain for slot, fact in facts.items()}, legal

    @staticmethod
    def _same(text: str) -> Fact:
        return Fact(text, text)

    def _party(self) -> str:
        rng = self._rng
        family = rng.pick(self._name_starts) + rng.pick(words.NAME_ENDS)
        if rng.chance(0.15):
            return f"{rng.pick(words.FIRST_NAMES)} {family}"
        return f"{family} {rng.pick(words.TRADES)} {rng.pick(words.COMPANY_FORMS)}"

    def _amount(self) -> Fact:
        rng = self._rng
        code, name = rng.pick(words.CURRENCIES)
        step = rng.pick((50, 100, 1000))
        value = step * rng.between(3, 99)
        plain = f"{code} {value:,}"
        style = rng.below(3)
        if style == 0:
            return Fact(f"the sum of {in_words(value)} {name} ({plain})", plain)
        if style == 1:
            return Fact(f"{plain} ({in_words(value)} {name})", plain)
        return Fact(plain, plain)

    def _date(self) -> Fact:
        rng = self._rng
        day, month, year = rng.between(1, 28), rng.pick(MONTHS), rng.between(2024, 2039)
        legal = rng.pick(
            (
                f"the {ordinal(day)} day of {month} {year}",
                f"{day} {month} {year}",
                f"{month} {day}, {year}",
            )
        )
        return Fact(legal, f"{day} {month} {year}")

    def _period(self, units: Sequence[tuple[str, int, int]]) -> Fact:
        unit, low, high = self._rng.pick(units)
        number = self._rng.between(low, high)
        legal = self._wording(words.PERIODS).format(words=in_words(number), n=number, unit=unit)
        return Fact(legal, f"{number} {unit}")

    def _when(self) -> Fact:
        """Draws a time limit: either a date or a period that follows an event."""
        if self._rng.chance(0.5):
            date = self._date()
            return Fact(self._wording(words.DATE_LIMITS).format(date=date.legal), f"by {date.plain}")
        period = self._period((("days", 5, 90), ("weeks", 2, 12)))
        meaning, wordings = self._rng.pick(words.EVENTS)
        return Fact(f"within {period.legal} {self._wording(wordings)}", f"within {period.plain} {meaning}")
