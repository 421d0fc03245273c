"""What an output was made with: settings and package versions, in `provenance.json` of its folder."""

import dataclasses
import functools
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.files import read_json, write_json

logger = logging.getLogger(__name__)
FILE = "provenance.json"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors")


def package_versions() -> dict[str, str]:
    """Versions of the packages that can change a result (the build suffix left off)."""
    return {name: _version(name) for name in PACKAGES}


@functools.cache  # a sweep asks a dozen times a point, and each time reads the package's metadata
def _version(name: str) -> str:
    return version(name).split("+")[0]


def write_provenance(folder: Path, stage: str, *groups: Any, **extra: Any) -> None:
    """Writes the settings groups (dataclasses such as DataConfig) that decided the folder's content."""
    settings = {_name(group): dataclasses.asdict(group) for group in groups}
    write_json(folder / FILE, {"stage": stage, "settings": settings, "versions": package_versions(), **extra})


def check_provenance(folder: Path, *groups: Any) -> dict[str, Any]:
    """Returns the folder's provenance after comparing its settings with the ones in force.

    Raises:
        ConfigError: a setting differs; all differences in one message.
    """
    made = read_json(folder / FILE)
    wanted = {_name(group): dataclasses.asdict(group) for group in groups}
    differences = [
        f"  {name}.{key}: made with {made['settings'][name].get(key)!r}, now {value!r}"
        for name, values in wanted.items()
        if name in made["settings"]
        for key, value in values.items()
        if made["settings"][name].get(key) != value
    ]
    if differences:
        raise ConfigError(
            f"{folder} was made with other settings:\n"
            + "\n".join(differences)
            + f"\nRun `python -m stages.{made['stage']}` "
            "with the same overrides first and point runtime.inputs_dir at its output folder, or use `dvc exp run -S`."
        )
    for name, now in package_versions().items():
        then = made["versions"].get(name)
        if then != now:
            logger.warning("%s was made with %s %s; installed is %s", folder, name, then, now)
    return made


def _name(group: Any) -> str:
    return type(group).__name__.removesuffix("Config").lower()
