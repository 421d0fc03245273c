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
        if CheckExperiment.checked or not _is_dvc(Path(sys.argv[0])):
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


def _is_dvc(program: Path) -> bool:
    """Whether this process is `dvc` or `python -m dvc`."""
    return program.name == "dvc" or (program.name == "__main__.py" and program.parent.name == "dvc")


def _check_hand_edit() -> None:
    """Raises: ConfigError: params.yaml is neither composed, nor committed, nor an experiment's: it would be lost."""
    if not PARAMS.exists():
        return
    text = PARAMS.read_text(encoding="utf-8")
    composed = dump(compose([]))
    if text == composed:
        return
    found = "\n".join(f"  {line}" for line in differences(text, composed))
    if text in _recorded_params():
        print(f"params.yaml held the settings of a commit or experiment; composing it from conf/ again:\n{found}")
        return
    raise ConfigError(
        f"params.yaml was edited by hand; `dvc exp run` would overwrite that with what conf/ composes to:\n{found}\n"
        "Give the value with -S, or write it into conf/ and run `make params`."
    )


def _recorded_params() -> set[str]:
    """params.yaml as HEAD and the DVC experiments have it (not DVC's own stashes, which hold the hand edit itself)."""
    refs = _git("for-each-ref", "--format=%(refname)", "refs/exps").split()
    names = ["HEAD", *(ref for ref in refs if ref.split("/")[2] not in ("stash", "exec", "celery", "apply"))]
    return {_git("show", f"{name}:{PARAMS}") for name in names}


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], capture_output=True, text=True, check=False).stdout
