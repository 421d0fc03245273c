"""In which order a worker measures a point."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import point_runs
from pipeline.config import compose_config


@pytest.mark.parametrize(
    ("is_made_elsewhere", "order"),
    [(False, ["overlap", "models", "overlap"]), (True, ["models", "overlap"])],  # the second time from the store
)
def test_the_overlap_of_the_rows_keeps_no_other_worker_waiting(
    is_made_elsewhere: bool, order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data/processed").mkdir(parents=True)
    done: list[str] = []

    def note(name: str, result: Any) -> Any:
        done.append(name)
        return result

    monkeypatch.setattr(point_runs, "_overlap_inputs", lambda evaluate, processed: {})
    monkeypatch.setattr(point_runs, "is_being_made", lambda kind, inputs: is_made_elsewhere)
    monkeypatch.setattr(point_runs, "_contamination", lambda point, processed: note("overlap", {"exact": 1}))
    monkeypatch.setattr(point_runs, "measure", lambda project, processed: note("models", ({}, True)))
    written: list[Any] = []
    monkeypatch.setattr(point_runs, "write_evaluation", lambda *given: written.append(given[3]))
    point: Any = SimpleNamespace(config=compose_config([]), folder=tmp_path)
    assert point_runs.evaluate_point(point, torch.device("cpu"))
    assert done == order
    assert written == [{"exact": 1}]
