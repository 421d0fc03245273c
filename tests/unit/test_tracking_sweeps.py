"""Sweeps in MLflow: the parts that need no store."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from pipeline import tracking_sweeps
from pipeline.errors import DataError, TrackingError
from pipeline.files import write_json
from pipeline.points import Point, State, Sweep
from pipeline.tracking_runs import PARENT, RunRecord, describe_training
from pipeline.tracking_sweep_records import parent_record, point_run
from pipeline.tracking_sweeps import tag_point
from pipeline.workspace import RUN
from tests.records import FINGERPRINT, STARTED_AT, make_record, settings, tracked


def make_sweep(folder: Path, ranks: tuple[int, ...] = (4, 8), seeds: tuple[int, ...] = (0,), failed: int = 0) -> Path:
    """A sweep that ended: a finished point each, then `failed` ones that never trained."""
    points = [*itertools.product(ranks, seeds), *((rank, 99) for rank in range(failed))]
    sweep = Sweep(folder, "python -m stages.train -m lora.r=4,8", "local", started=STARTED_AT)
    sweep.axes = {"lora.r": list(ranks), "train.seed": list(seeds)}
    sweep.points = [f"{number:03}" for number in range(len(points))]
    for number, (rank, seed) in enumerate(points):
        overrides = [f"lora.r={rank}", f"train.seed={seed}"]
        point = Point(folder / f"{number:03}", number, overrides, {"lora.r": rank, "train.seed": seed}, "")
        point.command = f"python -m stages.point {' '.join(overrides)}"
        point.settings = dataclasses.asdict(settings(lora__r=rank, train__seed=seed))
        point.fingerprint = f"{1000 * rank + seed:064x}"
        if seed == 99:
            point.end(State.failed, "out of memory")
        else:
            make_record(point.folder, point.fingerprint, 1.0 + rank / 100, lora__r=rank, train__seed=seed)
            for name in ("merge", "gate"):
                (point.folder / f"metrics/{name}.json").unlink()
            point.end(State.finished)
    sweep.end(State.failed if failed else State.finished)
    return folder


def make_comparison(folder: Path, loss: float) -> None:
    setting = {"point": "001", "swept": {"lora.r": 8}, "trainable_parameters": 512, "validation_loss": 0.5}
    setting |= {"training_seconds": 9.0, "scores": {"loss": {"value": loss, "low": 0.2}, "bleu": {"value": None}}}
    write_json(folder / "comparison/settings.json", {"best": setting, "smallest": setting})


def test_a_point_is_tagged_as_a_child():
    run = describe_training(settings(), FINGERPRINT, {})
    child = tag_point(run, "ranks", "parent-id", 7, "python -m stages.point lora.r=4")
    assert child.tags[PARENT] == "parent-id"
    assert (child.tags["sweep"], child.tags["sweeps"], child.tags["point"]) == ("ranks", "ranks", "007")
    assert child.tags["command"] == "python -m stages.point lora.r=4"
    assert child.params == run.params
    assert PARENT not in tag_point(run, "ranks", None, 7, "").tags
    assert PARENT not in run.tags


def test_the_parent_says_what_was_swept_and_how_it_ended(tmp_path):
    folder = make_sweep(tmp_path / "ranks", failed=1)
    record = parent_record(Sweep.load(folder), "id")
    assert record.run.run_name == "ranks · 3 points · r × seed"
    assert record.run.tags["swept.lora.r"] == "4, 8"
    assert "- 002 r=0 seed=99: out of memory" in record.run.tags["mlflow.note.content"]
    assert (record.values["sweep.num_finished"], record.values["sweep.num_failed"]) == (2, 1)
    assert record.run.params == {}  # a param such as `lora.r` would stand among the children's


def test_a_point_that_never_trained_has_its_settings(tmp_path):
    folder = make_sweep(tmp_path / "ranks", failed=1)
    run = point_run(Point.load(folder / "002"), "id")
    assert (run.params["lora.r"], run.params["train.seed"]) == (0, 99)
    assert run.run_name.startswith("r0 a16")
    assert {key.split(".")[0] for key in run.params} == {"data", "model", "quantization", "lora", "train"}
    assert point_run(Point.load(folder / "000"), "id") == RunRecord.load(folder / "000" / RUN)


def test_a_point_without_settings_has_what_was_swept(tmp_path):
    point = Point(tmp_path, 0, ["lora.r=0"], {"lora.r": 0}, "", fingerprint=None)
    point.end(State.failed, "lora.r: 0 is under 1")
    run = point_run(point, "id")
    assert run.params == {"lora.r": 0}
    assert run.run_name == "r=0"
    point.number = 1
    assert point_run(point, "id").fingerprint != run.fingerprint


def test_a_store_out_of_reach_warns_once_and_points_do_not_wait_for_it(tmp_path, monkeypatch, caplog):
    attempts = []

    def unreachable() -> None:
        attempts.append(1)
        raise TrackingError("no answer.")

    monkeypatch.setattr(tracking_sweeps, "import_mlflow", unreachable)
    monkeypatch.setattr(tracking_sweeps, "_failed_at", tracking_sweeps._failed_at)
    folder = make_sweep(tmp_path / "ranks")
    assert tracking_sweeps.open_sweep(folder, tracked()) is None
    assert tracking_sweeps.record_point(folder / "000", tracked()) is None
    assert len(attempts) == 1
    assert tracking_sweeps.record_sweep(folder, tracked()) is None
    assert len(attempts) == 2  # at the end it is tried again
    assert "no answer. `python -m pipeline.tracking sync` sends" in caplog.text


@pytest.mark.parametrize("call", ["open_sweep", "record_sweep"])
def test_no_tracking_is_no_tracking(tmp_path, monkeypatch, call):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    folder = make_sweep(tmp_path / "ranks")
    assert getattr(tracking_sweeps, call)(folder, tracked(tracking=False)) is None
    assert tracking_sweeps.record_point(folder / "000", tracked(tracking=False)) is None
    assert not (tmp_path / "root").exists()
    assert not list(folder.rglob(tracking_sweeps.MARK))


def test_the_comparison_is_on_the_parent(tmp_path):
    folder = make_sweep(tmp_path / "ranks")
    make_comparison(folder, 0.25)
    record = parent_record(Sweep.load(folder), "id")
    assert record.values["best.test.loss"] == 0.25
    assert record.values["smallest.trainable_parameters"] == 512
    assert "best.test.bleu" not in record.values
    assert record.run.tags["best.settings"] == "r=8"
    assert set(record.artifacts) == {"comparison/settings.json"}
    write_json(folder / "comparison/settings.json", {"best": []})
    with pytest.raises(DataError, match=r"settings\.json: not a comparison"):
        parent_record(Sweep.load(folder), "id")
