"""What Hydra and DVC find on their own: the typed schema, and a check before `dvc exp run` composes.

Hydra imports every module below `hydra_plugins`; DVC does so before it composes `conf/` into params.yaml. Without
the check DVC answers a typo in `-S` with "unexpected error", and loses a hand edit of params.yaml in silence.
No torch import here: it would add seconds to every `dvc exp run`.
"""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from pipeline.config import PARAMS, check_overrides, compose, differences, dump
from pipeline.errors import ConfigError
from pipeline.schema import RunConfig

for group in fields(RunConfig):  # `defaults: [schema]` in a group's file makes the group typed
    ConfigStore.instance().store(group=group.name, name="schema", node=group.type, provider="pipeline.schema")
OmegaConf.register_new_resolver("mul", lambda *factors: _product(factors), replace=True)


def _product(factors: tuple[float, ...]) -> float:
    product: float = 1
    for factor in factors:
        product *= factor
    return product


class CheckExperiment(SearchPathPlugin):
    """Refuses, before DVC composes, what DVC would lose or answer with a traceback."""

    checked = False

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if CheckExperiment.checked or Path(sys.argv[0]).name != "dvc":
            return
        CheckExperiment.checked = True
        from dvc.cli.parser import get_main_parser
        from dvc.exceptions import InvalidArgumentError

        overrides = getattr(get_main_parser().parse_args(sys.argv[1:]), "set_param", [])
        try:
            _check_hand_edit()
            check_overrides([override.removeprefix(f"{PARAMS}:") for override in overrides])
        except ConfigError as error:
            raise InvalidArgumentError(str(error)) from None


def _check_hand_edit() -> None:
    """Raises: ConfigError: params.yaml holds what neither conf/ nor git knows, and composing would overwrite it."""
    if not PARAMS.exists():
        return
    text = PARAMS.read_text(encoding="utf-8")
    composed = dump(compose([]))
    if text == composed:
        return
    found = "\n".join(f"  {line}" for line in differences(text, composed))
    blob = subprocess.run(["git", "hash-object", str(PARAMS)], capture_output=True, text=True, check=True).stdout.strip()
    known = subprocess.run(["git", "cat-file", "-e", blob], capture_output=True, check=False).returncode == 0
    if known:
        print(f"params.yaml held settings of an earlier experiment or commit; composing it from conf/ again:\n{found}")
        return
    raise ConfigError(
        f"params.yaml was edited by hand, and `dvc exp run` would overwrite that with what conf/ composes to:\n{found}\n"
        "Give the value with -S, or write it into conf/ and run `make params`."
    )
