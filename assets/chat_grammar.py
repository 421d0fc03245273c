"""Builds general chats for pretraining: questions on a passage, look-ups, copying.

A chat is a list of messages as `apply_chat_template` takes them.
"""

from __future__ import annotations

import general_words as words
from general_grammar import (
    Event,
    amount,
    both_forms,
    company,
    date,
    family_name,
    filler,
    item,
    legal_prose,
    made_up_word,
    make_text,
    minutes,
    period,
    person,
    someone,
    story,
    word_row,
)
from grammar_tools import Rng, capitalise
from retell_grammar import retell

Message = dict[str, str]
Pair = tuple[str, str]


def reading(rng: Rng) -> Pair:
    """Returns a passage with two events and a question on one of them."""
    events = [Event.draw(rng), Event.draw(rng)]
    passage = " ".join((events[0].told(rng), filler(rng) if rng.chance(0.5) else legal_prose(rng), events[1].told(rng)))
    event = rng.pick(events)
    question, answer = rng.pick(
        (
            (f"Who {event.past} the {event.thing}?", event.who),
            (f"Who paid for the {event.thing}?", event.whom),
            (f"When was it that {event.who} {event.past} something?", event.day),
            (f"Where was the {event.thing}?", f"At the {event.place}"),
            (f"How much was paid for the {event.thing}?", event.price),
            (
                f"What did {event.who} do for {event.whom}?",
                f"{event.who} {event.past} the {event.thing} for {event.whom}",
            ),
            (
                f"Tell me about the {event.thing} in one sentence.",
                f"{event.who} {event.past} the {event.thing} for {event.whom} on {event.day} for {event.price}",
            ),
        )
    )
    return (f"{passage}\n\n{question}" if rng.chance(0.5) else f"{question}\n\n{passage}"), f"{answer}."


def roles(rng: Rng) -> Pair:
    """Returns a passage in which roles stand for names, and asks for the names."""
    first, second = someone(rng), someone(rng)
    role_one, role_two = (capitalise(role) for role in rng.sample(words.JOBS, 2))
    binding = rng.pick(
        (
            f"{first} is the {role_one} and {second} is the {role_two}.",
            f'We call {first} "the {role_one}" and we call {second} "the {role_two}".',
            f"{first} (the {role_one}) met {second} (the {role_two}).",
            f"The {role_one}: {first}. The {role_two}: {second}.",
        )
    )
    verb, past = rng.pick(words.ACTIONS)
    thing, price, day = item(rng), amount(rng), date(rng)
    turned = rng.chance(0.5)
    doer, other = (role_two, role_one) if turned else (role_one, role_two)
    doer_name, other_name = (second, first) if turned else (first, second)
    passage = (
        f"{binding} {rng.pick((filler(rng), ''))} The {doer} {past} the {thing} for the {other} on {day} for {price}."
    )
    question, answer = rng.pick(
        (
            (f"Who {past} the {thing}?", doer_name),
            (f"For whom was the {thing}?", other_name),
            (f"Who is the {role_one}?", first),
            (f"Who is the {role_two}?", second),
            ("Say it with names.", f"{doer_name} {past} the {thing} for {other_name} on {day} for {price}"),
            ("Say it with names.", f"{doer_name} {past} the {thing} for {other_name} on {day} for {price}"),
        )
    )
    return f"{passage}\n\n{question}", f"{answer}."


def repeat(rng: Rng) -> Pair:
    """Asks to repeat words or a sentence."""
    makers = (made_up_word, family_name, company, amount, date, period, item, person, word_row, word_row)
    if rng.chance(0.7):
        text = ", ".join(rng.pick(makers)(rng) for _ in range(rng.between(1, 7)))
    else:
        text = rng.pick((legal_prose, filler))(rng)
    return f"{rng.pick(('Repeat after me', 'Copy this', 'Say exactly'))}: {text}", text


def look_up(rng: Rng) -> Pair:
    """Gives a table of pairs and asks for one value."""
    keys = (made_up_word, family_name, person, item)
    values = (amount, date, period, company, person, family_name)
    key_maker, value_maker = rng.pick(keys), rng.pick(values)
    table = [(key_maker(rng), value_maker(rng)) for _ in range(rng.between(3, 7))]
    key, value = rng.pick(table)
    listing = "\n".join(f"{left}: {right}" for left, right in table)
    return f"{listing}\n\n{key}?", value


def shorten(rng: Rng) -> Pair:
    """Asks for the short form of dates, numbers and amounts."""
    pairs = [both_forms(rng) for _ in range(rng.between(1, 3))]
    return (
        "Write it shorter: " + "; ".join(formal for formal, _ in pairs),
        "; ".join(short for _, short in pairs),
    )


def reword(rng: Rng) -> Pair:
    """Asks for a simpler wording of a stiff sentence from everyday life."""
    who, whom, thing, place = person(rng), person(rng), item(rng), rng.pick(words.PLACES)
    formal, short = both_forms(rng)
    verb, _ = rng.pick(words.ACTIONS)
    stiff, simple = rng.pick(
        (
            (f"{who} is most kindly requested to {verb} the {thing}", f"{who} should {verb} the {thing}"),
            (
                f"It is the wish of {who} that {whom} might {verb} the {thing}",
                f"{who} wants {whom} to {verb} the {thing}",
            ),
            (
                f"It has come to the notice of {who} that the {thing} was seen by {whom}",
                f"{whom} saw the {thing}, says {who}",
            ),
            (f"{whom} begs to thank {who} for the loan of a {thing}", f"{whom} thanks {who} for the {thing}"),
            (f"The {thing} is believed by {whom} to belong to {who}", f"{whom} thinks the {thing} is {who}'s"),
        )
    )
    remark, plain_remark = rng.pick(
        (
            (f", the number in question being {formal}", f" ({short})"),
            (f", in the vicinity of the {place}", f" near the {place}"),
            ("", ""),
        )
    )
    return f"Say it simply: {stiff}{remark}.", f"{simple}{plain_remark}."


def form(rng: Rng) -> Pair:
    """Asks to fill in a form from a told event."""
    event = Event.draw(rng)
    return (
        f"{event.told(rng)}\n\nFill in the form: who, what, when, price.",
        f"Who: {event.who}\nWhat: {event.thing}\nWhen: {event.day}\nPrice: {event.price}",
    )


def continue_text(rng: Rng) -> Pair:
    """Asks for a text that comes with its names."""
    maker = rng.pick((story, minutes, make_text))
    text = maker(rng)
    return f"Write this down: {text}", text


# Repeated entries are the more frequent ones.
KINDS = (
    *(retell, retell, retell, retell, retell, retell, retell, retell),
    *(reading, reading, roles, roles, repeat, repeat, look_up, shorten, reword, form, continue_text),
)
SYSTEM_LINES = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "Use only what you are told.",
    "You help people read.",
)


def copy_chat(rng: Rng) -> list[Message]:
    """Returns a chat that only asks to repeat."""
    question, answer = repeat(rng)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def make_chat(rng: Rng) -> list[Message]:
    """Returns one chat of a random kind, at times with a system line or a tool's answer."""
    messages = [{"role": "system", "content": rng.pick(SYSTEM_LINES)}] if rng.chance(0.1) else []
    for _ in range(rng.between(2, 4) if rng.chance(0.1) else 1):
        question, answer = rng.pick(KINDS)(rng)
        if rng.chance(0.04):
            value = rng.pick((amount, date, person))(rng)
            messages += [
                {"role": "user", "content": f"Look up {made_up_word(rng)}."},
                {"role": "tool", "content": value},
                {"role": "assistant", "content": f"It is {value}."},
            ]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages
