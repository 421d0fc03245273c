"""Builds everyday rewording exercises for pretraining.

Each takes a stiff account of favours, visits and games and tells it plainly, with
names in place of roles and figures in place of words. The domain, the wordings and
the answers have nothing in common with the contract clauses.
"""

from __future__ import annotations

import general_words as words
from general_grammar import both_forms_of, company, family_name, filler, item, legal_prose, person
from grammar_tools import Rng, capitalise, word_list

ANIMALS = word_list("cat dog horse goat parrot pony hen donkey duck rabbit")
LESSONS = word_list("French chess fencing drawing cooking dancing arithmetic rowing singing juggling")
DISHES = word_list("pies cakes soups dumplings puddings omelettes pancakes stews sandwiches tarts")
WEEKDAYS = word_list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

# Plain telling, then stiff ones. {A} acts, {B} is the other, and each slot is copied.
FRAMES = (
    (
        "{A} lends {B} the {thing} for {period}",
        (
            "{A} has graciously offered {B} the use of the {thing} for {period}",
            "the {thing} of {A} is for {period} at the disposal of {B}",
            "for {period} {B} has the pleasure of borrowing the {thing} that {A} owns",
        ),
    ),
    (
        "{A} will meet {B} at the {place} on {date}",
        (
            "{A} proposes to receive {B} at the {place} on {date}",
            "on {date} {B} can expect to encounter {A} in the vicinity of the {place}",
            "the {place} is where {B} and, at the wish of the same, {A} come together on {date}",
        ),
    ),
    (
        "{A} won {amount} from {B} at cards on {date}",
        (
            "{B} was relieved of {amount} by {A} at the card table on {date}",
            "at cards on {date} {A} had the good luck to gain {amount} from {B}",
            "on {date} fortune at cards took {amount} from {B} and bestowed it on {A}",
        ),
    ),
    (
        "{A} teaches {B} {lesson} every {weekday}",
        (
            "{B} receives instruction in {lesson} from {A} each {weekday}",
            "each {weekday} the lesson in {lesson} is given by {A} and attended by {B}",
            "{lesson} is what {A} imparts to {B} whenever it is {weekday}",
        ),
    ),
    (
        "{A} looks after the {animal} of {B} until {date}",
        (
            "the care of the {animal} belonging to {B} falls to {A} until {date}",
            "{A} has consented to tend, until {date}, the {animal} that {B} calls its own",
            "until {date} {B} leaves the {animal} in the good hands of {A}",
        ),
    ),
    (
        "{A} cooked {count} {dish} for {B}",
        (
            "{A} had the honour to prepare {count} {dish} for the table of {B}",
            "{count} {dish} were set before {B}, {A} having made them",
            "{B} was regaled with {dish} to the number of {count} from the kitchen of {A}",
        ),
    ),
    (
        "{A} found the {thing} of {B} at the {place}",
        (
            "the {thing} which {B} had mislaid came to light at the {place} thanks to {A}",
            "at the {place} {A} happened upon the {thing} that {B} was missing",
            "{B} regained the {thing}, the same having been spotted at the {place} by {A}",
        ),
    ),
    (
        "{A} walked to {town} with {B} in {period}",
        (
            "{A}, with {B} for company, reached {town} on foot in {period}",
            "{town} was gained on foot by {A} and {B} after {period}",
            "it took {period} before {B}, led by {A}, set foot in {town}",
        ),
    ),
    (
        "{A} swapped the {thing} for the {thing_two} of {B}",
        (
            "{A} gave up the {thing} to {B} in return for the {thing_two}",
            "{B} let go of the {thing_two} and was handed by {A} the {thing}",
            "the {thing} of {A} and the {thing_two} of {B} changed hands",
        ),
    ),
    (
        "{A} painted the {place} of {B} for {amount}",
        (
            "the {place} of {B} got a coat of paint from the brush of {A}, {amount} being asked",
            "for {amount} {A} put fresh colour on the {place} of {B}",
            "{B} had the {place} painted, giving {amount} to {A}",
        ),
    ),
    (
        "{A} told {B} about {topic} on {date}",
        (
            "on {date} {B} was given by {A} a long account of {topic}",
            "{A} could not but speak to {B} on {date} of {topic}",
            "what {B} knows of {topic} came on {date} from {A}",
        ),
    ),
    (
        "{A} sang {count} songs for {B} at the {place}",
        (
            "{B} was treated by {A} to {count} songs at the {place}",
            "at the {place} {A} raised a voice in {count} songs to please {B}",
            "{count} songs rang out at the {place}, {A} singing and {B} listening",
        ),
    ),
    (
        "{A} waits {period} for {B} at the {place}",
        (
            "{A} is prepared to linger {period} at the {place} in the hope of {B}",
            "the {place} sees {A} tarry {period} until the coming of {B}",
            "{B} is awaited by {A} for {period} at the {place}",
        ),
    ),
    (
        "{A} gave {B} {count} {things} and the {thing}",
        (
            "{B} was presented by {A} with {count} {things} and the {thing}",
            "{count} {things} and the {thing} passed as a gift from {A} to {B}",
            "a gift of the {thing} along with {count} {things} was made by {A} to {B}",
        ),
    ),
)
TAILS = (
    ("if it stays dry", ("should the weather hold", "dry skies being granted")),
    ("but not on {weekday}", ("with the exception of {weekday}", "any {weekday} being left out")),
    ("if {B} does not mind", ("should {B} raise no objection", "{B} having nothing against it")),
    ("while {C} is away", ("in the absence of {C}", "{C} being from home")),
    ("as {C} had asked", ("at the particular wish of {C}", "{C} having begged for it")),
    ("even though the {animal} was ill", ("despite the poor health of the {animal}", "the {animal} being unwell")),
    ("and it cost {amount_two}", ("at an outlay of {amount_two}", "{amount_two} being the price of it")),
)
SEQUELS = (
    (
        "Then {A} gave {B} {amount_two}.",
        ("Thereupon {amount_two} went from {A} to {B}.", "{B} was afterwards handed {amount_two} by {A}."),
    ),
    ("{B} was happy.", ("{B} was filled with delight.", "Great was the joy of {B}.")),
    ("People in {town_two} heard of it.", ("Word of it reached {town_two}.", "It was talked of as far as {town_two}.")),
    ("{A} wants to do it again.", ("{A} expressed a wish to repeat it.", "A repetition would be welcome to {A}.")),
)
BINDINGS = (
    "{a} is the {role_a} and {b} is the {role_b}. ",
    "{b} is known to all as the {role_b}, {a} as the {role_a}. ",
    'Let us call {a} "the {role_a}" and {b} "the {role_b}": ',
    "The {role_a} ({a}) knows the {role_b} ({b}). ",
    "",
    "",
)
REQUESTS = ("Retell this simply.", "Say it in simple words.", "Put it simply.", "Tell it with names and figures.")


def retell(rng: Rng) -> tuple[str, str]:
    """Returns a stiff account with a request to retell it, and the plain telling."""
    makers = (person, person, company)
    first, second, third = (rng.pick(makers)(rng) for _ in range(3))
    role_first, role_second = (capitalise(role) for role in rng.sample(words.JOBS, 2))
    binding = rng.pick(BINDINGS)
    slots = {
        "A": (f"the {role_first}", first) if binding else (first, first),
        "B": (f"the {role_second}", second) if binding else (second, second),
        "C": (third, third),
        "date": both_forms_of(rng, "date"),
        "period": both_forms_of(rng, "period"),
        "count": both_forms_of(rng, "count"),
        "amount": both_forms_of(rng, "amount"),
        "amount_two": both_forms_of(rng, "amount"),
    }
    same = {
        "thing": item(rng),
        "thing_two": item(rng),
        "things": f"{rng.pick(words.OBJECTS)}s",
        "place": rng.pick(words.PLACES),
        "town": family_name(rng),
        "town_two": family_name(rng),
        "lesson": rng.pick(LESSONS),
        "dish": rng.pick(DISHES),
        "animal": rng.pick(ANIMALS),
        "weekday": rng.pick(WEEKDAYS),
        "topic": rng.pick(words.SUBJECTS),
    }
    stiff_slots = same | {slot: stiff for slot, (stiff, _) in slots.items()}
    plain_slots = same | {slot: plain for slot, (_, plain) in slots.items()}

    plain, stiffs = rng.pick(FRAMES)
    stiff = rng.pick(stiffs)
    if rng.chance(0.45):
        meaning, wordings = rng.pick(TAILS)
        wording = rng.pick(wordings)
        stiff = f"{wording}, {stiff}" if rng.chance(0.5) else f"{stiff}, {wording}"
        plain = f"{plain}, {meaning}"
    sentences, plain = [f"{stiff}."], f"{plain}."
    if rng.chance(0.3):
        meaning, wordings = rng.pick(SEQUELS)
        sentences.append(rng.pick(wordings))
        plain = f"{plain} {meaning}"
    if rng.chance(0.35):
        noise = rng.pick((filler, legal_prose))(rng)
        sentences.insert(len(sentences) * rng.below(2), noise)
    told = " ".join(capitalise(sentence.format(**stiff_slots)) for sentence in sentences)
    passage = binding.format(a=first, b=second, role_a=role_first, role_b=role_second) + told
    return f"{rng.pick(REQUESTS)}\n\n{passage}", capitalise(plain.format(**plain_slots))
