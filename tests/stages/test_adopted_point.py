"""A sweep's point adopted under real DVC in a real git repository: its adapter comes from the store."""

import json

import pytest

from pipeline.files import hash_path, read_json
from tests.conftest import copy_project
from tests.stages.test_dvc import make_small, ran

TAKEN = "taken from .training/"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_adopted_point_is_not_trained_again(tmp_path) -> None:
    project = copy_project(tmp_path)
    make_small(project)
    project.run("dvc repro quantize")
    project.commit("prepared")
    project.run(
        "python -m stages.train -m lora=mlp lora.r=2 data.max_length=200,320 hydra.sweep.dir=multirun/few",
        timeout=600,
    )
    points = {path.parent: read_json(path) for path in sorted(project.folder.glob("multirun/few/*/point.json"))}
    assert [point["state"] for point in points.values()] == ["finished"] * 2
    shorter, other = points

    before = project.run("git status --porcelain conf params.yaml; cat conf/config.yaml params.yaml")
    said = project.run("python -m pipeline.adopt multirun/few --best --dry-run")
    assert any(f"adopted: {folder.name}  finished  test loss " in said for folder in points)
    said = project.run(f"python -m pipeline.adopt multirun/few {other.name}")
    assert "  lora.target_modules: all_linear -> mlp" in said
    assert f"is in the store (.training/{points[other]['fingerprint'][:12]}): `dvc repro` takes it from there" in said
    output = project.run("dvc repro", timeout=600)
    assert ran(output) == ["check", "train", "evaluate", "merge", "report", "gate"]
    assert TAKEN + points[other]["fingerprint"][:12] in output
    assert hash_path(project.folder / "models/adapter") == hash_path(other / "models/adapter")
    evaluated = json.loads((project.folder / "metrics/evaluate.json").read_text())
    assert evaluated["adapter"]["loss"] == read_json(other / "metrics/evaluate.json")["adapter"]["loss"]

    said = project.run(f"python -m pipeline.adopt multirun/few {shorter.name}")  # other data than the project's
    assert "`dvc repro` does prepare first" in said
    output = project.run("dvc repro train")
    assert ran(output) == ["check", "prepare", "quantize", "train"]
    assert TAKEN + points[shorter]["fingerprint"][:12] in output
    assert hash_path(project.folder / "models/adapter") == hash_path(shorter / "models/adapter")

    project.edit("pipeline/optimizers.py", "import torch", "import torch\n\nCHANGED = 1")
    said = project.run(f"python -m pipeline.adopt multirun/few {shorter.name}")
    assert "`dvc repro` will train it again:\n  code: " in said
    output = project.run("dvc repro train")  # and so it does: what is said is not said always
    assert TAKEN not in output
    assert "train" in ran(output)

    project.run("python -m pipeline.adopt --undo")
    assert project.run("git status --porcelain conf params.yaml; cat conf/config.yaml params.yaml") == before
