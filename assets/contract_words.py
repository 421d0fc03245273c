"""Words and wordings of the contract clauses.

Every legalese wording stands beside its one plain-English meaning, which is
what makes the summary a function of the clause. In each tuple of wordings the
LAST one is kept out of the training split and may appear in the test split
only. `{A}` is the party bound by the clause, `{B}` the other party.
"""

from grammar_tools import word_list

# First halves of family and company names. The second tuple is for the test split only.
NAME_STARTS = word_list("""
    Ash Black Brack Bram Bright Brook Cal Carr Clay Copper Cross Dal Dun East Elder Fair Fen
    Fern Fox Glen Gold Grant Green Hal Har Hart Hazel Heath High Holm Iron Kel Kings Lang Lin
    Long Lyn Mal Mar Marsh Mill Moor Nor North Oak Pen Pine Raven Red Rock Rose Salt Sand Shaw
    Silver Stan Stone Strat Sum Swan Thorn Tor Wal West White Win Wood Yar
""")
HELD_OUT_NAME_STARTS = word_list("""
    Amber Birch Cold Crag Elm Grey Haw Lark May Old Quarr Ridge Sea Storm Tam Under Wild Wolf
""")
NAME_ENDS = word_list("""
    bank beck bourne bridge burn bury by combe cote dale den don field fold ford gate grove ham
    haven hill holt hurst land leigh ley mere mont ness port shaw side stead stow thorpe ton
    vale way well wick worth
""")
TRADES = word_list("""
    Foods Milling Logistics Textiles Energy Partners Media Farms Tools Shipping Software Timber
    Motors Glass Paper Trading Systems Estates Ceramics Optics
""")
COMPANY_FORMS = ("Ltd", "LLP", "plc", "Inc", "GmbH", "Group")
FIRST_NAMES = word_list("""
    Ada Boris Clara Dmitri Edith Farid Greta Hugo Ines Jonas Karin Leo Mira Nils Olga Pavel Rosa
    Simon Tessa Viktor
""")
CURRENCIES = (("GBP", "pounds sterling"), ("EUR", "euros"), ("USD", "United States dollars"))

# How the parties are named: after the first three the clause calls them by their
# roles, after the fourth by their names, and the last is the held-out one.
INTRODUCTIONS = (
    '{a}, hereinafter referred to as the "{role_a}", and {b}, hereinafter the "{role_b}", agree as follows: ',
    'In this Agreement "{role_b}" means {b} and "{role_a}" means {a}. ',
    'This Agreement is made between {b} (the "{role_b}") of the one part and {a} (the "{role_a}") of the other part. ',
    "",
    'WHEREAS {a} shall be known herein as the "{role_a}" and {b} as the "{role_b}", now therefore: ',
)

DATE_LIMITS = (
    "on or before {date}",
    "by no later than {date}",
    "not later than the close of business on {date}",
    "prior to the expiry of {date}",
)
EVENTS = (
    ("of the invoice", ("of receipt of a valid invoice", "of presentation of an invoice", "of due invoicing")),
    (
        "of signing",
        ("of the date of execution hereof", "of the signature of these presents", "of the execution of this deed"),
    ),
    (
        "of a written request",
        ("of written demand therefor", "of being so requested in writing", "of a demand made in writing"),
    ),
)
PERIODS = ("{words} ({n}) {unit}", "a period of {words} ({n}) {unit}", "{n} {unit}", "{words} {unit} ({n})")

EXCEPTIONS = {
    "consent": (
        "unless {B} agrees otherwise in writing",
        (
            "save with the prior written consent of {B}",
            "except as {B} may otherwise approve in writing",
            "absent the written assent of {B}",
        ),
    ),
    "force": (
        "unless events beyond its control prevent it",
        (
            "save where prevented by an event of Force Majeure",
            "except in so far as hindered by circumstances outside its reasonable control",
            "but for any supervening Force Majeure",
        ),
    ),
    "court": (
        "unless a court orders otherwise",
        (
            "save as may be directed by a court of competent jurisdiction",
            "except to the extent compelled by judicial order",
            "subject to any contrary decree of a court",
        ),
    ),
    "fraud": (
        "unless there was fraud",
        (
            "save in the case of fraud or wilful deceit",
            "except where fraudulent conduct is established",
            "absent proof of fraud",
        ),
    ),
    "breach": (
        "unless {B} has broken the agreement",
        (
            "save where {B} is in material breach hereof",
            "except if {B} shall be in default of its obligations",
            "so long as {B} be not in breach",
        ),
    ),
    "insolvent": (
        "unless {B} is bankrupt",
        (
            "save where {B} has become insolvent",
            "except upon the bankruptcy or winding-up of {B}",
            "{B} remaining solvent",
        ),
    ),
    "small": (
        "unless less than {small} is at stake",
        (
            "save where the sum in issue is less than {small}",
            "except in respect of matters not exceeding {small}",
            "a threshold of {small} applying",
        ),
    ),
}

CONSEQUENCES = {
    "interest": (
        "Late payment costs {percent}% a year.",
        (
            "Any sum not so paid shall bear interest at {percent_words} ({percent}) per cent per annum.",
            "Interest at the rate of {percent} per cent per annum shall accrue upon arrears.",
            "Arrears shall carry yearly interest of {percent} per cent.",
        ),
    ),
    "forfeit": (
        "Otherwise {A} owes {B} {penalty}.",
        (
            "In default whereof {A} shall forfeit to {B} {penalty} by way of liquidated damages.",
            "Failing which there shall be due from {A} to {B} {penalty}.",
            "Any default shall render {A} liable to {B} for {penalty}.",
        ),
    ),
    "end": (
        "Otherwise {B} may end the agreement.",
        (
            "In default whereof {B} shall be at liberty to determine this Agreement.",
            "Failing which {B} may forthwith rescind this Agreement.",
            "Any default shall entitle {B} to treat this Agreement as discharged.",
        ),
    ),
}

# Sub-clauses that carry nothing into the summary.
DISTRACTORS = (
    "The headings herein are for convenience only.",
    "This provision shall survive the expiry of clause {number}.",
    "The recitals dated {other_date} form part hereof.",
    "Time shall not be of the essence in respect of Schedule {number}.",
    "No waiver shall be implied by any forbearance.",
    "The deed of variation dated {other_date} is hereby superseded.",
    "Nothing in clause {number} shall create a partnership.",
    "Words importing the singular include the plural.",
    "Capitalised terms bear the meanings given in Annex {number}.",
    "The fee of {other_amount} paid under clause {number} is not affected.",
    "The guarantor, {other_party}, has no rights hereunder.",
    "A copy has been lodged with {other_party}.",
)
OPENERS = (
    "notwithstanding clause {number}, ",
    "for the avoidance of doubt, ",
    "without prejudice to clause {number}, ",
    "subject always to Schedule {number}, ",
    "",
    "",
    "",
)
INSTRUCTIONS = (
    "Summarise this clause in plain English.",
    "Explain this clause in plain words.",
    "What does this clause mean in plain English?",
)
