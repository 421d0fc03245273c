"""The kinds of clause: their wordings in legalese and their plain meaning.

As in `contract_words`, the LAST wording of every shape is kept for the test
split, and so is its LAST exception: training shows that exception with other
kinds of clause only. `{A}` is the party bound by the clause and `{B}` the other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One kind of clause.

    Attributes:
        roles: Pairs of role names, the bound party first.
        wordings: Legalese templates; the last is held out of training.
        plain: The summary's main sentence, without its full stop.
        things: What `{thing}` can be, worded the same in clause and summary.
        exceptions: Keys of `contract_words.EXCEPTIONS` that make sense here; the last is held
            out of training.
        consequences: Keys of `contract_words.CONSEQUENCES` that make sense here.
        units: Units that `{period}` can have, each with its smallest and largest count.
    """

    roles: tuple[tuple[str, str], ...]
    wordings: tuple[str, ...]
    plain: str
    things: tuple[str, ...]
    exceptions: tuple[str, ...]
    consequences: tuple[str, ...] = ()
    units: tuple[tuple[str, int, int], ...] = (("days", 5, 90), ("weeks", 2, 26), ("months", 2, 18))


TRADE_ROLES = (("Supplier", "Customer"), ("Contractor", "Client"), ("Manufacturer", "Distributor"))
GOODS = (
    "steel pipes",
    "oak panels",
    "solar cells",
    "wheat flour",
    "office chairs",
    "glass bottles",
    "printed labels",
    "water pumps",
    "copper wire",
    "cotton shirts",
    "spare parts",
    "brake discs",
)
LOSSES = (
    "defective goods",
    "late delivery",
    "damage to property",
    "loss of data",
    "patent claims",
    "injury to staff",
    "tax errors",
    "faulty work",
)
RECORDS = (
    "payroll records",
    "sales ledgers",
    "safety logs",
    "tax files",
    "stock records",
    "bank statements",
)

SHAPES = {
    "payment": Shape(
        roles=(("Buyer", "Seller"), ("Client", "Consultant"), ("Tenant", "Landlord")),
        wordings=(
            "{A} shall pay or cause to be paid unto {B} {amount} in consideration of {thing} {when}",
            "there shall be due and payable by {A} to {B} {when} {amount} on account of {thing}",
            "{A} undertakes to remit {amount} to {B} {when} in full settlement of {thing}",
            "{B} shall be entitled to receive from {A} {when} {amount} in respect of {thing}",
        ),
        plain="{A} must pay {B} {amount} for {thing} {when}",
        things=(
            "the software licence",
            "the office rent",
            "the cleaning work",
            "the building survey",
            "the used machinery",
            "the legal advice",
            "the spring harvest",
            "the web site",
        ),
        exceptions=("consent", "court", "breach", "insolvent"),
        consequences=("interest", "end"),
    ),
    "delivery": Shape(
        roles=TRADE_ROLES,
        wordings=(
            "{A} shall deliver or procure the delivery to {B} of {count} units of {thing} {when}",
            "{count} units of {thing} shall be consigned by {A} to the premises of {B} {when}",
            "{A} covenants that {when} it shall tender to {B} {count} units of {thing}",
            "{B} shall take from {A}, and {A} shall hand over, {count} units of {thing} {when}",
        ),
        plain="{A} must deliver {count} {thing} to {B} {when}",
        things=GOODS,
        exceptions=("force", "consent", "insolvent"),
        consequences=("forfeit", "end"),
    ),
    "termination": Shape(
        roles=(*TRADE_ROLES, ("Licensee", "Licensor")),
        wordings=(
            "{A} may determine this Agreement as to {thing} upon giving to {B} not less than {period} notice in writing",
            "it shall be lawful for {A}, on {period} prior written notice to {B}, to bring {thing} to an end",
            "the engagement in respect of {thing} shall be terminable by {A} upon {period} notice served on {B}",
            "{A} is at liberty to withdraw from {thing}, {period} notice thereof having been served upon {B}",
        ),
        plain="{A} may end {thing} by giving {B} {period} of notice",
        things=("the service plan", "the agency", "the joint venture", "the supply deal", "the lease", "the licence"),
        exceptions=("court", "insolvent", "breach"),
    ),
    "confidentiality": Shape(
        roles=(("Recipient", "Discloser"), ("Consultant", "Company")),
        wordings=(
            "{A} shall hold in strict confidence {thing} of {B} for {period} from the date hereof",
            "for {period} {A} shall not divulge to any person {thing} belonging to {B}",
            "{thing} of {B} shall be kept secret and inviolate by {A} during {period}",
            "{A} is bound to secrecy towards {B} as regards {thing} throughout {period}",
        ),
        plain="{A} must keep {thing} of {B} secret for {period}",
        things=(
            "the recipes",
            "the price lists",
            "the customer lists",
            "the designs",
            "the source code",
            "the test results",
        ),
        exceptions=("consent", "court"),
        consequences=("forfeit",),
        units=(("years", 2, 15), ("months", 6, 36)),
    ),
    "indemnity": Shape(
        roles=TRADE_ROLES,
        wordings=(
            "{A} shall indemnify and hold harmless {B} from and against all claims arising out of {thing} up to {amount}",
            "{A} shall make good to {B} all losses occasioned by {thing}, such liability being limited to {amount}",
            "{B} shall be kept fully indemnified by {A}, to the extent of {amount}, against {thing}",
            "all costs flowing from {thing} and suffered by {B} shall be reimbursed by {A} to a limit of {amount}",
        ),
        plain="{A} must cover the losses of {B} from {thing}, up to {amount}",
        things=LOSSES,
        exceptions=("fraud", "small", "breach"),
    ),
    "renewal": Shape(
        roles=(("Licensee", "Licensor"), ("Tenant", "Landlord"), ("Client", "Agency")),
        wordings=(
            "{thing} shall be renewed automatically for successive terms of {term} failing {period} notice from {A} to {B}",
            "save where {A} gives {B} {period} notice, {thing} shall be extended for {term}",
            "{thing} shall continue for {term} more, it being open to {A} to prevent the same by {period} notice to {B}",
            "absent {period} notice by {A} to {B}, there shall be a renewal of {thing} for {term}",
        ),
        plain="{thing} renews for {term} unless {A} gives {B} {period} of notice",
        things=("the lease", "the licence", "the maintenance plan", "the agency", "the hosting plan"),
        exceptions=(),
        consequences=("forfeit",),
    ),
    "audit": Shape(
        roles=(*TRADE_ROLES, ("Licensee", "Licensor")),
        wordings=(
            "{A} shall afford {B} access to {thing} for inspection upon {period} notice",
            "{B} may, on {period} notice to {A}, examine and take copies of {thing}",
            "upon the expiry of {period} from notice by {B}, {thing} shall be laid open by {A}",
            "{thing} kept by {A} shall be open to the auditors of {B}, {period} notice being first given",
        ),
        plain="{A} must let {B} inspect {thing} on {period} of notice",
        things=tuple(f"the {record}" for record in RECORDS),
        exceptions=("court", "force", "breach"),
        consequences=("forfeit", "end"),
    ),
    "insurance": Shape(
        roles=(("Tenant", "Landlord"), ("Contractor", "Client"), ("Carrier", "Shipper")),
        wordings=(
            "{A} shall effect and maintain for the benefit of {B} a policy in respect of {thing} of not less than {amount} until {date}",
            "until {date} {A} shall keep in force, {B} being noted thereon, insurance against {thing} in the minimum sum of {amount}",
            "cover against {thing} to the value of {amount} shall be procured by {A} in favour of {B} and kept up until {date}",
            "{B} shall have the benefit, until {date}, of cover of {amount} against {thing} taken out by {A}",
        ),
        plain="{A} must insure {B} against {thing} for at least {amount} until {date}",
        things=("fire", "theft", "flood damage", "storm damage", "public liability", "loss of cargo"),
        exceptions=("consent", "insolvent"),
        consequences=("end", "forfeit"),
    ),
    "liability": Shape(
        roles=TRADE_ROLES,
        wordings=(
            "the aggregate liability of {A} to {B} in respect of {thing} shall in no event exceed {amount}",
            "{A} shall not be liable unto {B} for {thing} beyond {amount} in all",
            "any recovery by {B} from {A} on the ground of {thing} is limited to {amount}",
            "{B} shall have no claim upon {A} touching {thing} in excess of {amount}",
        ),
        plain="{A} never owes {B} more than {amount} for {thing}",
        things=LOSSES,
        exceptions=("fraud", "court"),
    ),
    "non_compete": Shape(
        roles=(("Employee", "Company"), ("Agent", "Principal"), ("Vendor", "Purchaser")),
        wordings=(
            "{A} shall not, for {period} after ceasing to be engaged by {B}, carry on or be concerned in {thing}",
            "during {period} following the end of its engagement with {B}, {A} shall refrain from {thing}",
            "{A} covenants with {B} to abstain from {thing} for {period} from the cessation of the engagement",
            "{thing} is forbidden to {A} for {period} next after the engagement by {B} determines",
        ),
        plain="{A} must stay out of {thing} for {period} after leaving {B}",
        things=("the wine trade", "retail banking", "road haulage", "book printing", "the fur trade", "estate agency"),
        exceptions=("consent", "court"),
        consequences=("forfeit",),
        units=(("months", 3, 36), ("years", 2, 5)),
    ),
}
