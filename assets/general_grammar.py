"""Builds plain general texts: stories, letters, notes, news, fact lists, minutes.

Every text repeats its own names, dates and amounts, so that a model trained on
it learns to look back and copy. Nothing here summarises a contract.
"""

from __future__ import annotations

from dataclasses import dataclass

import general_words as words
from grammar_tools import MONTHS, Rng, capitalise, in_words, ordinal


def made_up_word(rng: Rng) -> str:
    """Returns a pronounceable word that is probably new."""
    syllables = 1 + rng.below(2)
    text = "".join(rng.pick(words.ONSETS) + rng.pick(words.VOWELS) + rng.pick(words.CODAS) for _ in range(syllables))
    return text + (rng.pick(words.ENDINGS) if rng.chance(0.6) else "")


def family_name(rng: Rng) -> str:
    """Returns a made-up family or town name, at times put together from common words."""
    if rng.chance(0.4):
        stem = rng.pick(rng.pick((words.ADJECTIVES, words.OBJECTS, words.PLACES)))
        return capitalise(stem + rng.pick(words.ENDINGS))
    return capitalise(made_up_word(rng))


def person(rng: Rng) -> str:
    """Returns a first and a family name."""
    first = rng.pick(words.FIRST_NAMES) if rng.chance(0.8) else family_name(rng)
    return f"{first} {family_name(rng)}"


def company(rng: Rng) -> str:
    """Returns the name of a company, club or institution."""
    return f"{family_name(rng)} {rng.pick(words.TRADES)} {rng.pick(words.COMPANY_FORMS)}"


def someone(rng: Rng) -> str:
    """Returns a person or a company."""
    return person(rng) if rng.chance(0.5) else company(rng)


def amount(rng: Rng) -> str:
    """Returns an amount of money in figures."""
    value = rng.pick((1, 10, 50, 100, 1000)) * rng.between(2, 99)
    return f"{rng.pick(words.CURRENCIES)[0]} {value:,}"


def date(rng: Rng) -> str:
    """Returns a date such as "4 May 1987"."""
    return f"{rng.between(1, 28)} {rng.pick(MONTHS)} {rng.between(1900, 2040)}"


def period(rng: Rng) -> str:
    """Returns a length of time such as "14 days"."""
    return f"{rng.between(2, 96)} {rng.pick(words.UNITS)}"


def item(rng: Rng) -> str:
    """Returns a described thing such as "old lamp"."""
    return f"{rng.pick(words.ADJECTIVES)} {rng.pick(words.OBJECTS)}"


def both_forms_of(rng: Rng, kind: str) -> tuple[str, str]:
    """Returns a formal and a short form of one date, period, count or amount."""
    if kind == "date":
        day, month, year = rng.between(1, 28), rng.pick(MONTHS), rng.between(1900, 2040)
        short = f"{day} {month} {year}"
        return rng.pick((f"the {ordinal(day)} day of {month} {year}", f"{month} {day}, {year}", short)), short
    if kind == "period":
        number, unit = rng.between(2, 96), rng.pick(words.UNITS)
        short = f"{number} {unit}"
        return rng.pick((f"{in_words(number)} ({number}) {unit}", short)), short
    if kind == "count":
        number = rng.between(2, 99) * rng.pick((1, 10))
        return rng.pick((f"{in_words(number)} ({number})", str(number))), str(number)
    code, name = rng.pick(words.CURRENCIES)
    value = rng.pick((10, 50, 100, 1000)) * rng.between(2, 99)
    short = f"{code} {value:,}"
    return rng.pick(
        (f"the sum of {in_words(value)} {name} ({short})", f"{short} ({in_words(value)} {name})", short)
    ), short


def both_forms(rng: Rng) -> tuple[str, str]:
    """Returns a formal and a short form of something that can be counted."""
    return both_forms_of(rng, rng.pick(("date", "period", "count", "amount")))


@dataclass(frozen=True)
class Event:
    """Who did what with which thing, where, when and for how much."""

    who: str
    whom: str
    verb: str
    past: str
    thing: str
    place: str
    day: str
    price: str

    @classmethod
    def draw(cls, rng: Rng) -> Event:
        """Draws an event."""
        verb, past = rng.pick(words.ACTIONS)
        return cls(someone(rng), someone(rng), verb, past, item(rng), rng.pick(words.PLACES), date(rng), amount(rng))

    def told(self, rng: Rng) -> str:
        """Tells the event in one sentence, in one of several ways."""
        return rng.pick(
            (
                f"On {self.day} {self.who} {self.past} the {self.thing} for {self.whom} at the {self.place} and was paid {self.price}.",
                f"{self.who} {self.past} the {self.thing} at the {self.place} on {self.day}, and {self.whom} paid {self.price} for it.",
                f"For {self.price}, {self.who} {self.past} the {self.thing} for {self.whom}; it was at the {self.place}, on {self.day}.",
                f"It was {self.who} who {self.past} the {self.thing} for {self.whom}. That was on {self.day}, at the {self.place}, for {self.price}.",
                f"At the {self.place}, {self.whom} gave {self.price} to {self.who}, who {self.past} the {self.thing} on {self.day}.",
            )
        )


def filler(rng: Rng) -> str:
    """Returns a sentence without facts."""
    return rng.pick(
        (
            f"There was {rng.pick(words.WEATHER)} all day, and everyone was {rng.pick(words.FEELINGS)}.",
            f"People still talk about {rng.pick(words.SUBJECTS)}.",
            f"The {rng.pick(words.PLACES)} was {rng.pick(words.ADJECTIVES)} and {rng.pick(words.ADJECTIVES)}.",
            f"Nobody was {rng.pick(words.FEELINGS)} about {rng.pick(words.SUBJECTS)}.",
            f"After the {rng.pick(words.WEATHER)} came the {rng.pick(words.WEATHER)}.",
        )
    )


def legal_prose(rng: Rng) -> str:
    """Returns a loose sentence with legal vocabulary."""
    noun, other = rng.sample(words.LEGAL_NOUNS, 2)
    adjective, adverb = rng.pick(words.LEGAL_ADJECTIVES), rng.pick(words.LEGAL_ADVERBS)
    verb, past, phrase = rng.pick(words.LEGAL_VERBS), rng.pick(words.LEGAL_PAST), rng.pick(words.LEGAL_PHRASES)
    return rng.pick(
        (
            f'In the old books the words "{phrase}" stand beside "{adverb}" and "{adjective}".',
            f"The {adjective} {noun} was {past} with the {other}.",
            f"A student asked what {noun} and {other} are, and whether one may {verb} an {other}.",
            f"To {verb} is a verb; {past}, {adverb} and {adjective} are words that lawyers like.",
            f'The teacher wrote "{phrase}" and "{noun}" on the board and said: {adverb}, {other}.',
            f"Every {noun} and any {other} shall be {past}, said the judge, {phrase} the {adjective} {rng.pick(words.LEGAL_NOUNS)}.",
        )
    )


def story(rng: Rng) -> str:
    """Returns a short story about two people and a thing."""
    hero, friend, thing, place, town = person(rng), person(rng), item(rng), rng.pick(words.PLACES), family_name(rng)
    verb, past = rng.pick(words.ACTIONS)
    price, days = amount(rng), period(rng)
    sentences = [
        f"{hero} lived in {town} and had a {thing}.",
        f"One day {friend} came from {family_name(rng)} to the {place} and asked for the {thing}.",
        f'"I shall {verb} the {thing} for {price}," said {hero}.',
        f'"That is {price} too much," said {friend}, "but I will wait {days}."',
        f"So {friend} waited {days} near the {place} in {town}.",
        f"In the end {hero} {past} the {thing}, and {friend} gave {price} to {hero}.",
        filler(rng),
        f"{hero} and {friend} were {rng.pick(words.FEELINGS)}, and the {thing} stayed in {town}.",
    ]
    drop = rng.between(2, 6)
    return " ".join(sentence for index, sentence in enumerate(sentences) if index != drop)


def letter(rng: Rng) -> str:
    """Returns a letter with a date, a greeting and a signature."""
    sender, receiver, event = person(rng), person(rng), Event.draw(rng)
    day = date(rng)
    return (
        f"{family_name(rng)}, {day}\n\nDear {receiver},\n\n{event.told(rng)} {filler(rng)} "
        f"I am {rng.pick(words.FEELINGS)} that {event.who} kept the {event.thing}. Please send {event.price} to {sender} "
        f"by {day}, or write to {event.whom}.\n\nYours,\n{sender}"
    )


def note(rng: Rng) -> str:
    """Returns a short note that says one thing in two ways."""
    formal, short = both_forms(rng)
    who, thing = person(rng), item(rng)
    return rng.pick(
        (
            f"Note for {who}: {formal}. In short: {short}. Bring the {thing}, {who}.",
            f"{who} wrote {formal} on the {thing}. It means {short}, said {who}.",
            f"Written in full: {formal}. Written briefly: {short}. Signed by {who} with the {thing}.",
        )
    )


def news(rng: Rng) -> str:
    """Returns a news item."""
    firm, speaker, town, event = company(rng), person(rng), family_name(rng), Event.draw(rng)
    cost, when = amount(rng), period(rng)
    family = speaker.split()[-1]
    return (
        f"{town.upper()} NEWS. {firm} will spend {cost} on {rng.pick(words.SUBJECTS)} in {town}. "
        f"{speaker}, a {rng.pick(words.JOBS)} at {firm}, said the {cost} would last {when}. {event.told(rng)} "
        f'"After {when}," {family} said, "{firm} and {event.who} will meet in {town}."'
    )


def facts(rng: Rng) -> str:
    """Returns a list of facts and the same facts in sentences."""
    name, town, job, price, day, thing = (
        someone(rng),
        family_name(rng),
        rng.pick(words.JOBS),
        amount(rng),
        date(rng),
        item(rng),
    )
    fields = rng.sample(
        (("Name", name), ("Town", town), ("Work", job), ("Price", price), ("Date", day), ("Thing", thing)), 6
    )
    listing = "\n".join(f"{key}: {value}" for key, value in fields)
    prose = f"{name} of {town} is the {job}. The {thing} cost {name} {price} on {day}."
    return f"{listing}\n{prose}" if rng.chance(0.6) else f"{prose}\n{listing}"


def minutes(rng: Rng) -> str:
    """Returns the minutes of a meeting in which roles stand for names."""
    first, second = someone(rng), someone(rng)
    role_one, role_two = rng.sample(words.JOBS, 2)
    thing, price, when = item(rng), amount(rng), period(rng)
    return (
        f"Present: {first} (the {role_one}) and {second} (the {role_two}). The {role_one} asked the {role_two} "
        f"for the {thing}. The {role_two} wanted {price} within {when}. {legal_prose(rng)} It was agreed that {first} pays {second} "
        f"{price} within {when} and that {second} gives {first} the {thing}."
    )


def study(rng: Rng) -> str:
    """Returns a few sentences about legal words."""
    return " ".join(legal_prose(rng) for _ in range(rng.between(2, 4))) + f" Today's words: {word_row(rng)}."


def word_row(rng: Rng) -> str:
    """Returns a few common and legal words in random order."""
    lists = (
        words.COMMON_WORDS,
        words.COMMON_WORDS,
        words.LEGAL_NOUNS,
        words.LEGAL_PAST,
        words.LEGAL_ADVERBS,
        words.JOBS,
        words.TRADES,
    )
    return " ".join(rng.pick(rng.pick(lists)) for _ in range(rng.between(3, 10)))


def copies(rng: Rng) -> str:
    """Returns a random list of words followed by the same list."""
    makers = (made_up_word, family_name, company, amount, date, period, item, word_row, word_row, word_row)
    entries = ", ".join(rng.pick(makers)(rng) for _ in range(rng.between(3, 8)))
    return f"{entries}; {entries}."


KINDS = (story, letter, note, news, facts, minutes, study, copies, copies)


def make_text(rng: Rng) -> str:
    """Returns one general text of a random kind."""
    return rng.pick(KINDS)(rng)
