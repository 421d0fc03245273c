"""Every command of the README runs (or, where it needs a GPU or the Hub, composes), and every file it names exists."""

import re
import shlex

import pytest
from hydra.core.config_store import ConfigStore

from pipeline.config import check_overrides
from tests.conftest import ROOT, Project, copy_project
from tests.stages.test_dvc import make_small

README = (ROOT / "README.md").read_text(encoding="utf-8")
REVISION = "0" * 40


def commands(kind: str) -> list[str]:
    """The commands of the README's ```bash KIND blocks, without comments."""
    blocks = re.findall(rf"^```bash{kind and ' ' + kind}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_every_block_is_of_a_kind_that_is_run() -> None:
    kinds = set(re.findall(r"^```bash ?(.*)$", README, flags=re.MULTILINE))
    assert kinds == {"", "slow", "data", "model", "gpu", "sweep", "queue", "before", "gpus", "methods"}


def test_every_path_that_it_names_exists_or_is_made() -> None:
    made = (
        "models/",
        "reports/",
        "metrics/",
        "outputs/",
        ".training/",
        ".venv",
        "multirun/",
        "conf/data/support.yaml",
        "conf/data/NAME.yaml",
        "conf/gate/release.yaml",
    )
    names = set(
        re.findall(r"`((?:conf|docs|assets|params|dvc|models|reports|metrics|outputs|\.training)[\w./-]*)`", README)
    )
    names |= set(re.findall(r"\]\((?!http)([\w./-]+)\)", README))
    assert names
    assert [name for name in sorted(names) if not name.startswith(made) and not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "command",
    [c for kind in ("data", "model", "gpu", "methods") for c in commands(kind) if c.startswith("dvc")]
    + commands("queue")[:1],
)
def test_commands_for_other_machines_compose(command: str) -> None:
    words = shlex.split(command.replace("<commit>", REVISION))
    assert words[:3] == ["dvc", "exp", "run"]
    check_overrides([word for flag, word in zip(words, words[1:], strict=False) if flag == "-S"])


@pytest.mark.parametrize(
    "command", [c for c in (*commands("sweep"), *commands("gpus"), *commands("methods")) if "python -m stages." in c]
)
def test_sweeps_compose(command: str) -> None:
    overrides = [word for word in shlex.split(command, comments=True)[3:] if word != "-m"]
    choices = dict(line.split("=", 1) for line in overrides if line.startswith("hydra/"))
    assert all(ConfigStore.instance().load(f"{group}/{name}.yaml") for group, name in choices.items())
    check_overrides([line for line in overrides if not line.startswith("hydra")], "run")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = copy_project(tmp_path_factory.mktemp("readme"))
    make_small(project)
    (project.folder / ".venv").symlink_to(ROOT / ".venv")  # made by `make test`; a copy has none
    return project


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everyday_commands_run_one_after_another(project: Project) -> None:
    for command in commands(""):
        output = project.run(f"bash -c {shlex.quote(command)}", timeout=400)
        assert "Traceback" not in output, command


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("before"))
def test_plan_and_doctor(project: Project, command: str) -> None:
    assert "Traceback" not in project.run(command)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_make_repro(project: Project) -> None:
    assert commands("slow") == ["make repro", "make test"]  # make test: this is it
    output = project.run("make repro", timeout=600)
    assert "where to look next" in output
