"""The doctor on installed packages: the pins, requirements between them, second copies, extras."""

import importlib.metadata
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.doctor_refusal import REMEDY, ROOT, Finding, Patient, Status

NUM_NAMED = 5
# (package, its versions, another, the versions that it breaks with, why): what their own metadata do not say
BAD_PAIRS = (
    ("hydra-core", "<1.4", "omegaconf", ">=2.4", "hydra-core 1.3 cannot read it"),
    ("hydra-core", "<1.4", "hydra-ax-sweeper", ">=0", "on Python 3.11 it breaks every Hydra app by being installed"),
    ("hydra-optuna-sweeper", "<1.4", "optuna", ">=3", "it needs optuna < 3; this project has a sweeper of its own"),
)
EXTRAS = {
    ("hydra/sweeper", "optuna"): "sweep", ("hydra/launcher", "ray"): "ray", ("hydra/launcher", "slurm"): "slurm",
}  # fmt: skip


def distributions() -> dict[str, list[importlib.metadata.Distribution]]:
    """Every copy of every installed package, the one that Python finds first; a folder under two names counts once."""
    found: dict[str, dict[Path, importlib.metadata.Distribution]] = defaultdict(dict)
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # what an interrupted pip left has none
            found[canonicalize_name(name)].setdefault(Path(str(distribution.locate_file(""))).resolve(), distribution)
    return {name: list(copies.values()) for name, copies in found.items()}


def check_pins(patient: Patient) -> Iterator[Finding]:
    """Installed versions against constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    installed = distributions()
    wrong = []
    for pin in pins:
        copies = installed.get(canonicalize_name(pin.name))
        if copies is None:
            wrong.append(f"{pin.name} missing")
        elif not pin.specifier.contains(copies[0].version, prereleases=True):
            wrong.append(f"{pin.name} {copies[0].version} for {str(pin.specifier).lstrip('=')}")
    if wrong:
        found = f"{len(wrong)} of {len(pins)} packages are not what constraints.txt pins: {_some(wrong)}"
        yield Finding("warn", found, f"equal results are promised for equal versions only: {REMEDY}")
    else:
        yield Finding("ok", f"all {len(pins)} are those of constraints.txt")


def check_requirements(patient: Patient) -> Iterator[Finding]:
    """What the project's packages ask of one another, as `pip check` does, and pairs known not to work."""
    installed = {name: copies[0] for name, copies in distributions().items()}
    mine = _needed(installed)
    wrong = []
    for name in sorted(mine):
        for requirement in _requires(installed[name]):
            other = installed.get(canonicalize_name(requirement.name))
            if other is None:
                wrong.append(f"{name} needs {requirement.name}, which is missing")
            elif not requirement.specifier.contains(other.version, prereleases=True):
                wrong.append(f"{name} {installed[name].version} needs {requirement}; installed is {other.version}")
    wrong += _bad_pairs({name: distribution.version for name, distribution in installed.items()})
    for text in wrong[:NUM_NAMED]:
        yield Finding("fail", text, REMEDY)
    if not wrong:
        yield Finding("ok", f"{len(mine)} packages fit one another")


def _bad_pairs(versions: dict[str, str]) -> list[str]:
    return [
        f"{one} {versions[one]} with {other} {versions[other]}: {why}"
        for one, ones, other, others, why in BAD_PAIRS
        if one in versions
        and other in versions
        and Requirement(f"{one}{ones}").specifier.contains(versions[one], prereleases=True)
        and Requirement(f"{other}{others}").specifier.contains(versions[other], prereleases=True)
    ]


def _needed(installed: dict[str, importlib.metadata.Distribution]) -> set[str]:
    """The project's dependencies that are installed, and theirs."""
    queue = [canonicalize_name(requirement.name) for requirement in _project("dependencies")]
    needed: set[str] = set()
    while queue:
        name = queue.pop()
        if name in installed and name not in needed:
            needed.add(name)
            queue += [canonicalize_name(requirement.name) for requirement in _requires(installed[name])]
    return needed


def _requires(distribution: importlib.metadata.Distribution) -> Iterator[Requirement]:
    """What it always needs here (its extras left out)."""
    for requirement in map(Requirement, distribution.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def _project(table: str, extra: str | None = None) -> list[Requirement]:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][table]
    return [Requirement(line) for line in (lines if extra is None else lines[extra])]


def check_copies(patient: Patient) -> Iterator[Finding]:
    """Packages that lie in two folders of sys.path: the first hides the second, or is mixed with it."""
    wanted = {str(canonicalize_name(needed.name)): needed.specifier for needed in _project("dependencies")}
    twice = {name: copies for name, copies in distributions().items() if len(copies) > 1}
    for name in sorted(twice):
        first, *hidden = twice[name]
        where = ", hiding ".join(f"{copy.version} in {copy.locate_file('')}" for copy in twice[name])
        status: Status = "fail" if name in wanted else "warn"
        remedy = "unset PYTHONPATH, or remove one of the two (`pip uninstall`)"
        if _sees_system() and not any(map(_is_own, hidden)):
            if name not in wanted or wanted[name].contains(first.version, prereleases=True):
                status = "warn"
                remedy = "none is needed: the first is used; an environment without --system-site-packages has no other"
            elif _is_own(first):
                remedy = f"{REMEDY} puts the right one into the environment, in front of the system's"
        yield Finding(status, f"{name} {where}", remedy)
    if not twice:
        yield Finding("ok", "no package lies twice on Python's path")


def _sees_system() -> bool:
    """Whether this is an environment made with --system-site-packages: its own come first, the system's after them."""
    file = Path(sys.prefix, "pyvenv.cfg")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return re.search(r"^include-system-site-packages\s*=\s*true\s*$", text, re.IGNORECASE | re.MULTILINE) is not None


def _is_own(distribution: importlib.metadata.Distribution) -> bool:
    return Path(str(distribution.locate_file(""))).resolve().is_relative_to(Path(sys.prefix).resolve())


def check_extras(patient: Patient) -> Iterator[Finding]:
    """The optional packages that the chosen sweeper, launcher, harness and engine need."""
    wanted: dict[str, Status] = {extra: "fail" for choice, extra in EXTRAS.items() if choice in patient.choices}
    config = patient.config
    if config is not None and config.evaluate.harness_tasks:
        wanted["harness"] = "fail"
    if config is not None and config.runtime.engine == "deepspeed":
        wanted["deepspeed"] = "fail" if config.runtime.num_processes > 1 else "warn"  # one process does not import it
    installed = distributions()
    for extra, status in wanted.items():
        for requirement in _project("optional-dependencies", extra):
            copies = installed.get(canonicalize_name(requirement.name))
            if copies is not None and requirement.specifier.contains(copies[0].version, prereleases=True):
                yield Finding("ok", f"{requirement.name} {copies[0].version}, for the extra {extra}")
                continue
            what = "is missing" if copies is None else f"{copies[0].version} is installed"
            remedy = f"`pip install -c constraints.txt -e '.[{extra}]'`"
            yield Finding(status, f"{requirement}, for the extra {extra}: {what}", remedy)
    if not wanted:
        yield Finding("ok", "these settings need none")


def _some(lines: Iterable[str]) -> str:
    listed = list(lines)
    more = len(listed) - NUM_NAMED
    return "; ".join(listed[:NUM_NAMED]) + (f"; and {more} more" if more > 0 else "")
