"""Is everything here that a fine-tune needs? Each line says ok, warn or fail, what was found, and what to do.

Command: python -m pipeline.doctor [overrides]     # the settings that you mean to run with
Exit code: 0 for ok and warn, 1 for fail; with --strict also for warn. `--json` for programs.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence

from pipeline import doctor_refusal
from pipeline.doctor_refusal import REMEDY, Check, Finding, Patient
from pipeline.errors import ConfigError, PipelineError


def examine(overrides: Sequence[str], only: Sequence[str] = ()) -> Iterator[Finding]:
    """Every finding of every check (or of those named), in the table's order, as soon as it is there.

    Raises:
        ConfigError: `only` names no check.
    """
    too_old = False
    for finding in run(Check("python", doctor_refusal.check_python), Patient(None)):
        too_old |= finding.status == "fail"
        yield finding
    if too_old or set(only) == {"python"}:
        return  # where it is too old, nothing else could be imported
    patient = Patient(None)
    try:
        patient = read_settings(overrides)
        yield Finding("ok", f"conf/ and {len(overrides)} overrides compose", name="settings")
    except PipelineError as error:
        yield Finding("fail", str(error), "mend conf/ or the overrides; checks that need them are left out", "settings")
    except Exception as error:  # Hydra itself may be what is broken
        yield Finding("fail", _tell(error), REMEDY, "settings")
    try:
        checks = table()
    except Exception as error:
        yield Finding("fail", f"the doctor cannot run here: {_tell(error)}", REMEDY, "doctor")
        return
    names = ["python", "settings", *(check.name for check in checks)]
    if unknown := [name for name in only if name not in names]:
        raise ConfigError(f"--only: no check is called {', '.join(unknown)}; there are {', '.join(names)}.")
    for check in checks:
        if not only or check.name in only:
            yield from run(check, patient)


def table() -> tuple[Check, ...]:
    """Every check but that of Python. To add one: a function `(Patient) -> Iterator[Finding]`, and a line here.

    Those of `doctor_refusal.CHECKS` also stop stages.
    """
    from pipeline import doctor_device, doctor_machine, doctor_packages, doctor_project, doctor_services

    return (
        *(check for check in doctor_refusal.CHECKS if check.name != "python"),
        Check("pins", doctor_packages.check_pins),
        Check("requirements", doctor_packages.check_requirements),
        Check("copies", doctor_packages.check_copies),
        Check("extras", doctor_packages.check_extras),
        Check("git", doctor_project.check_git),
        Check("dvc", doctor_project.check_dvc),
        Check("dvc cache", doctor_project.check_dvc_cache),
        Check("hydra", doctor_project.check_hydra),
        Check("params.yaml", doctor_project.check_params_file),
        Check("dvc.yaml", doctor_project.check_code_deps),
        Check("room", doctor_machine.check_room_for_all),
        Check("memory", doctor_machine.check_memory),
        Check("threads", doctor_machine.check_threads),
        Check("open files", doctor_machine.check_open_files),
        Check("text", doctor_machine.check_text),
        Check("clock", doctor_machine.check_clock),
        Check("processes", doctor_device.check_processes),
        Check("device", doctor_device.check_device),
        Check("store", doctor_project.check_store),
        Check("leases", doctor_project.check_leases),
        Check("mlflow", doctor_services.check_mlflow),
        Check("hub", doctor_services.check_hub),
        Check("token", doctor_services.check_token),
    )


def run(check: Check, patient: Patient) -> Iterator[Finding]:
    """The check's findings under its name; one that breaks is a finding, too."""
    try:
        for finding in check.run(patient):
            yield finding if finding.name else dataclasses.replace(finding, name=check.name)
    except Exception as error:  # a broken library may raise anything
        yield Finding("fail", f"the check itself broke: {_tell(error)}", REMEDY, check.name)


def _tell(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def read_settings(overrides: Sequence[str]) -> Patient:
    """The composed settings, checked, and Hydra's choices. Raises: ConfigError: what is wrong with them."""
    import hydra

    from pipeline.config import CONF, compose_config

    config = compose_config(overrides)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        choices = hydra.compose("run", overrides=list(overrides), return_hydra_config=True).hydra.runtime.choices
    return Patient(config, None, tuple((str(group), str(choice)) for group, choice in choices.items()))


def show(finding: Finding, width: int = 16) -> str:
    """A line, and under it what to do."""
    margin = " " * (width + 6)
    lines = finding.found.splitlines() + ([f"to do: {finding.remedy}"] if finding.remedy else [])
    return f"{finding.status:<4}  {finding.name:<{width}}" + f"\n{margin}".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.doctor",
        description="Check this machine, environment and project, and say what to do.",
        epilog="Exit code: 0 where every check is ok or warn, 1 where one fails; with --strict also 1 for warn.",
    )
    parser.add_argument("overrides", nargs="*", help="settings that you mean to run with, such as model=llama3_8b")
    parser.add_argument("--only", action="append", default=[], metavar="CHECK", help="this one (again for another)")
    parser.add_argument("--strict", action="store_true", help="exit code 1 for warn, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    findings = []
    try:
        for finding in map(_hide_secrets, examine(options.overrides, options.only)):
            findings.append(finding)
            if not options.json:
                print(show(finding), flush=True)
    except ConfigError as error:
        parser.error(str(error))
    counts = {status: sum(f.status == status for f in findings) for status in ("fail", "warn", "ok")}
    worst = next((status for status, count in counts.items() if count), "ok")
    if options.json:
        print(json.dumps({"status": worst, "findings": [dataclasses.asdict(f) for f in findings]}, indent=2))
    else:
        print(f"\n{counts['fail']} fail, {counts['warn']} warn, {counts['ok']} ok")
    return int(worst == "fail" or (options.strict and worst == "warn"))


def _hide_secrets(finding: Finding) -> Finding:
    from pipeline.doctor_services import hide, secrets

    hidden = secrets()
    return dataclasses.replace(finding, found=hide(finding.found, hidden), remedy=hide(finding.remedy, hidden))


if __name__ == "__main__":
    sys.exit(main())
