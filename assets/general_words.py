"""Words of the general texts: people, places, things and a legal vocabulary.

Names are mostly made up of syllables, so that the model must learn to copy
what it reads instead of remembering a list.
"""

from grammar_tools import word_list

FIRST_NAMES = word_list("""
    Abel Agnes Albert Alma Amos Anna Arthur Bela Berta Carl Cora Daniel Della Edgar Ella Emil
    Erik Eva Felix Flora Frank Freda George Gilda Hanna Harold Helen Henry Ida Irma Ivan Jack
    Jane Joan John Julia Karl Kate Lars Laura Lena Lily Louis Lucy Luke Maria Mark Martha Max
    Nora Oscar Otto Paul Peter Rachel Robert Ruth Sarah Stella Thomas Ursula Vera Walter Wilma
""")
ONSETS = word_list("""
    b br c ch cl cr d dr f fl fr g gl gr h j k kl l m n p pl pr qu r s sh sk sl st str t th tr v
    w wh y z
""")
VOWELS = word_list("""
    a e i o u ai ea ee ie oa oo ou
""")
CODAS = (
    "",
    "",
    "n",
    "r",
    "l",
    "s",
    "t",
    "d",
    "m",
    "ck",
    "ng",
    "nd",
    "rn",
    "rt",
    "st",
    "sh",
    "th",
    "ll",
    "lt",
    "rd",
    "p",
    "x",
)
ENDINGS = word_list("""
    ton field ford well wood land bridge stead ham ley worth side gate stone burn mont ness by
    port ville berg house man er son ing ow ard ell ett in is or us
""")
TRADES = word_list("""
    Foods Bakery Logistics Textiles Energy Partners Media Farms Tools Shipping Software Timber
    Motors Glass Paper Trading Systems Estates Brothers Milling Ceramics Optics Books Music
    Theatre Museum Hospital School Library Bank Hotel
""")
COMPANY_FORMS = word_list("""
    Ltd LLP plc Inc GmbH Group Club Trust Society Company
""")
JOBS = word_list("""
    baker teacher farmer doctor nurse sailor painter driver gardener cook tailor clerk miller
    smith keeper guide judge lawyer tenant landlord supplier customer seller buyer agent owner
    borrower lender consultant contractor client distributor manufacturer employee carrier
    director guarantor
""")
OBJECTS = word_list("""
    lamp ladder basket kettle clock violin bicycle map letter coat book umbrella bucket rope
    lantern hammer chair mirror blanket trumpet parcel ring key drum camera saddle boat wagon
    piano table pump panel bottle shirt pipe wire label
""")
ADJECTIVES = word_list("""
    red blue green old new small large heavy light broken clean wooden silver quiet bright cold
    warm famous simple strange useful soft narrow round empty golden dusty cheap fine
""")
PLACES = word_list("""
    market harbour school garden station library church kitchen mill bridge park shop farm
    castle office museum theatre river field village warehouse hotel bakery hospital court bank
""")
ACTIONS = (
    ("bring", "brought"),
    ("carry", "carried"),
    ("repair", "repaired"),
    ("sell", "sold"),
    ("buy", "bought"),
    ("lend", "lent"),
    ("return", "returned"),
    ("find", "found"),
    ("lose", "lost"),
    ("paint", "painted"),
    ("hide", "hid"),
    ("clean", "cleaned"),
    ("send", "sent"),
    ("deliver", "delivered"),
    ("keep", "kept"),
    ("show", "showed"),
    ("inspect", "inspected"),
    ("insure", "insured"),
)
WEATHER = word_list("""
    rain wind snow sunshine fog frost thunder heat
""")
FEELINGS = word_list("""
    glad sorry proud angry tired curious happy worried thankful surprised
""")
SUBJECTS = (
    "the roof",
    "the school play",
    "the harvest",
    "the new road",
    "the bells",
    "the football match",
    "the flower show",
    "the old bridge",
    "the train times",
    "the summer fair",
    "the water supply",
    "the choir",
    "the bakery prices",
    "the night watch",
    "the winter coal",
    "the tax office",
)
UNITS = ("days", "weeks", "months", "years", "hours")
CURRENCIES = (
    ("GBP", "pounds sterling"),
    ("EUR", "euros"),
    ("USD", "United States dollars"),
    ("CHF", "Swiss francs"),
)

# Legal words in loose general sentences: they give the tokenizer and the
# embeddings the vocabulary, and nothing of how a clause maps to its meaning.
LEGAL_NOUNS = word_list("""
    agreement clause obligation liability indemnity termination renewal insurance premium audit
    invoice payment deposit consent notice warranty breach default claim covenant provision
    schedule annex deed recital licence lease assignment transfer policy statute court decree
    order tenant landlord licensee licensor recipient discloser principal agent guarantor
    damages interest forfeiture insolvency bankruptcy dispute forbearance waiver partnership
    execution signature demand approval settlement consideration confidence engagement
    competition recovery account particulars arrears defect expense premises jurisdiction
    obligations claims losses records reports units terms meanings rights convenience avoidance
    doubt prejudice variation presentation
""")
LEGAL_VERBS = word_list("""
    indemnify assign terminate renew determine rescind procure furnish covenant undertake remit
    refund release divulge maintain effect warrant remedy forfeit accrue approve compel
    establish supersede survive exceed reimburse extend notify submit render consign tender
    refrain abstain
""")
LEGAL_PAST = word_list("""
    indemnified assigned terminated renewed determined rescinded procured furnished undertaken
    remitted refunded released divulged maintained warranted remedied forfeited accrued approved
    compelled established superseded survived exceeded reimbursed extended notified submitted
    rendered consigned discharged occasioned limited entitled lodged capitalised implied
    directed prevented hindered
""")
LEGAL_ADVERBS = word_list("""
    hereby herein hereof hereinafter hereunder thereof therefor thereafter forthwith
    notwithstanding provided whereas aforesaid automatically materially strictly fraudulently
    wilfully successively reasonably lawfully
""")
LEGAL_ADJECTIVES = word_list("""
    material competent aggregate prior written wilful fraudulent liquidated successive
    reasonable lawful binding valid judicial harmless confidential defective insolvent
    supervening contrary strict liable
""")
LEGAL_PHRASES = (
    "by no later than",
    "on or before",
    "in respect of",
    "in the event of",
    "save where",
    "except where",
    "shall not be liable",
    "hereinafter referred to as",
    "per cent per annum",
    "the close of business",
    "without prejudice to",
    "subject to",
    "for the benefit of",
    "upon the expiry of",
    "arising out of",
    "in consideration of",
    "a period of",
    "not less than",
    "in default whereof",
    "failing which",
    "at its own expense",
    "of the one part",
    "of the other part",
    "the date hereof",
    "shall be entitled to",
)

# Ordinary English, for exercises in copying and for the tokenizer.
COMMON_WORDS = word_list("""
    a about above after again against all also among an and another any are as at back be
    because been before below between both but by can cease claim close come common contain cost
    could cover day do done down during each early either end enough even every evidence except
    few first for force free from full further gain get give given go good great had half happen
    has have having held help here high his hold how however if in into is it its keep kept kind
    know known large last late later lay least leave leaving less let life like limit little
    long made main make making many may mean means might more most much must near need never new
    next no not nothing now of off often old on once one only open or other otherwise our out
    over owe owes own part past people permit place plain possible put quite rather reach read
    really remain rest right same say second see send set several shall she should show side
    since small so some soon start stay still stop such sum take tell than that the their them
    then there these they thing third this those though through thus till time to told too took
    touch trade turn under unless until up upon use used value very want was way we well went
    were what when where whether which while who whole whom whose why will with within without
    word words work would write wrote year yet you your plus total abroad anyone answer
    beginning being charge complaints conditional convey copies customers damage data dealing
    delivered delivery dispose driving due earlier ending energy excess expiry extent faults
    faulty fire flood flour following fraud gratis hand haulage heading holding in writing
    injury inspection joint keeping land laid loan loss losses lists maintenance matters month
    notes numbers office opening order paid panels parts party payable paying person plan plans
    port price prices printing property public quarter receipt receive received recipes refuse
    regards reports repair request require response safety sales search secret security seller
    service shares sheet site software source spring staff stock storm summer supplied supply
    tax terms test theft trade units valid venture visit voice warehouse water weeks wheat wire
    wine signing singular plural convenience avoidance doubt affected superseded contract
    contracts explain summarise clause English meaning Agreement referred refer follows sterling
    euros pounds dollars United States without Without Subject Otherwise Notwithstanding Failing
    This For In Any The always provisions engagement respect jurisdiction business writing
    bankrupt Schedule Licensee Licensor Recipient Vendor Purchaser Principal Agency twenty
    thirty forty fifty sixty seventy eighty ninety hundred thousand two three four five six
    seven eight nine ten eleven twelve orders patent safety logs control beyond
""")

# What the tokenizer should hold as whole words, whatever the made-up names weigh.
WHOLE_WORDS = tuple(
    word
    for group in (
        COMMON_WORDS,
        LEGAL_NOUNS,
        LEGAL_PAST,
        LEGAL_ADVERBS,
        TRADES,
        COMPANY_FORMS,
        [job.capitalize() for job in JOBS],
    )
    for word in group
)
