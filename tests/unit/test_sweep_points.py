"""Points from overrides: the quick way to compose them gives what Hydra gives; axes, swept values, bad combinations."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline.config import compose
from pipeline.errors import ConfigError, DataError
from pipeline.points import Point, State, Sweep
from pipeline.sweep_points import Composer, find_axes, make_points


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.r=16"],
        ["lora.r=16", "lora.lora_alpha=7"],
        ["lora=attention", "lora.r=4"],
        ["lora.target_modules=[q_proj,v_proj]"],
        ["train=full", "train.learning_rate=1e-4", "train.max_steps=null"],
        ["data.files.validation=null", "data.validation_share=0.2"],
        ["experiment=rank_sweep", "lora.r=2"],
        ["experiment=faq", "train.num_epochs=1"],
        ["gate.conditions=['adapter.loss <= base.loss']"],
        ["lora.r=2", "lora.r=3"],
    ],
    ids=" ".join,
)
def test_the_quick_way_gives_what_hydra_gives(overrides: list[str]) -> None:
    composer = Composer()
    composer.compose(["lora.r=9", *overrides[:1]])  # what is kept must not be changed by what was composed before
    for _ in range(2):
        found, expected = composer.compose(overrides), compose(overrides, "run")
        del found.runtime.output_dir, expected.runtime.output_dir  # the time
        assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(expected)


def test_alpha_follows_the_rank_unless_it_is_swept() -> None:
    composer = Composer()
    assert [composer.compose([f"lora.r={r}"]).lora.lora_alpha for r in (2, 16)] == [4, 32]
    assert composer.compose(["lora.r=2", "lora.lora_alpha=5"]).lora.lora_alpha == 5


@pytest.mark.parametrize("override", ["lora.r=many", "lora=nothing", "train.method=magic"])
def test_what_cannot_be_is_a_config_error(override: str) -> None:
    with pytest.raises(ConfigError):
        Composer().compose([override])


def test_axes_are_the_keys_with_more_than_one_value() -> None:
    assert find_axes([["a.b=1", "c=x", "d=[1,2]"], ["a.b=2", "c=x", "d=[1]"]]) == {"a.b": [1, 2], "d": [[1, 2], [1]]}
    assert find_axes([["a=1"]]) == {}


def test_points_know_their_own_values_and_a_bad_one_says_why(tmp_path: Path) -> None:
    overrides = [["lora.r=2", "train.seed=3"], ["lora.r=0", "train.seed=3"], ["lora.r=4", "train.seed=3"]]
    points = make_points(tmp_path, overrides, 5, ["runtime.num_threads=1"], Composer())
    assert [point.folder.name for point in points] == ["005", "006", "007"]
    assert [point.swept for point in points] == [{"lora.r": 2}, {"lora.r": 0}, {"lora.r": 4}]
    assert [point.state for point in points] == [State.waiting, State.failed, State.waiting]
    assert "lora.r" in str(points[1].reason)
    assert points[0].config.lora.lora_alpha == 4
    assert points[0].config.runtime.num_threads == 1
    assert points[0].command == "python -m stages.point lora.r=2 train.seed=3"


def test_an_axis_over_a_group_is_named_by_its_choice(tmp_path: Path) -> None:
    points = make_points(tmp_path, [["lora=attention"], ["lora=mlp"]], 0, [], Composer())
    assert [point.swept for point in points] == [{"lora": "attention"}, {"lora": "mlp"}]


def test_records_come_back_as_they_were_saved(tmp_path: Path) -> None:
    (point,) = make_points(tmp_path, [["lora.r=2"]], 0, [], Composer())
    point.end(State.failed, "it broke")
    assert Point.load(point.folder) == point
    sweep = Sweep(tmp_path, "python -m stages.train -m lora.r=2", "local", points=["000"])
    sweep.end(State.failed)
    assert Sweep.load(tmp_path) == sweep
    assert sweep.load_points() == [point]


@pytest.mark.parametrize("content", ["{}", '{"state": "odd"}', "[]", "not json"])
def test_damaged_records_are_data_errors(tmp_path: Path, content: str) -> None:
    for name, load in (("point.json", Point.load), ("sweep.json", Sweep.load)):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=name):
            load(tmp_path)


def test_a_sweep_that_is_not_there_lists_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Sweep(tmp_path / "multirun/one", "", "local").save()
    with pytest.raises(DataError, match=r"multirun/two: no sweep there. There are: multirun/one\."):
        Sweep.load(Path("multirun/two"))
