"""Which of the models is measured when: nobody waits for what another process is measuring while there is other work."""

from pathlib import Path

import pytest

from pipeline import stored_evaluation
from pipeline.config import compose_config
from pipeline.evidence import ModelItems
from pipeline.project_models import ProjectModels
from pipeline.workspace import Workspace

QLORA = ["base", "quantized", "adapter"]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models in the order in which they are measured, each by a stand-in."""
    names: list[str] = []

    def measure(project: ProjectModels, name: str, processed: Path) -> ModelItems:
        names.append(name)
        return ModelItems([{"name": name}], [], [])

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(stored_evaluation, "_measure", measure)
    monkeypatch.setattr(stored_evaluation, "_inputs", lambda project, name, processed: {"model": name})
    return names


def run(folder: Path, *overrides: str) -> tuple[dict[str, ModelItems], bool]:
    project = ProjectModels(compose_config(list(overrides)), Workspace(folder, folder), None)
    return stored_evaluation.measure(project, folder)


@pytest.mark.parametrize(
    ("busy", "order"),
    [
        ([], QLORA),
        (["base"], ["quantized", "adapter", "base"]),  # measured here too: the other was killed before its end
        (["base", "quantized"], ["adapter", "base", "quantized"]),
        (QLORA, QLORA),  # nothing else to do: waits for the first
    ],
)
def test_what_another_process_is_measuring_comes_last(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, busy: list[str], order: list[str]
) -> None:
    monkeypatch.setattr(stored_evaluation, "is_being_made", lambda kind, inputs: inputs["model"] in busy)
    found, is_new = run(tmp_path)
    assert measured == order
    assert is_new
    assert list(found) == QLORA
    assert all(items.test == [{"name": name}] for name, items in found.items())
    again, is_new = run(tmp_path)
    assert measured == order  # nothing once more
    assert not is_new
    assert again == found


def test_without_a_quantisation_the_base_stands_for_both(tmp_path: Path, measured: list[str]) -> None:
    found, _ = run(tmp_path, "quantization=none", "train=lora")
    assert measured == ["base", "adapter"]
    assert found["quantized"] == found["base"]
