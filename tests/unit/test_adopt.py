"""A point of a sweep as the project's configuration: what is written, what is refused, what is put back."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline import adopt, adopted_config, config, store
from pipeline.config import check_params, compose, compose_config, dump
from pipeline.errors import ConfigError, DataError
from pipeline.files import write_json
from pipeline.fingerprint import fingerprint, training_inputs
from pipeline.points import Point, State, Sweep
from tests.conftest import ROOT

LINE = next(line for line in (ROOT / "conf/config.yaml").read_bytes().splitlines(True) if b" experiment:" in line)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ with its params.yaml, in a git repository; commands run in it."""
    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    monkeypatch.setattr(config, "CONF", conf)
    monkeypatch.setattr(adopted_config, "CONF", conf)
    monkeypatch.setattr(adopted_config, "MAIN", conf / "config.yaml")
    monkeypatch.setattr(adopted_config, "ADOPTED", conf / "experiment" / "adopted.yaml")
    monkeypatch.setattr(adopt, "ADOPTED", conf / "experiment" / "adopted.yaml")
    monkeypatch.setattr(adopt, "pending_stages", lambda: ["prepare"])  # DVC's: tests/stages has it
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_params()
    git = "git -c user.name=a -c user.email=a@example.org"
    subprocess.run(f"git init -q && git add conf params.yaml && {git} commit -qm x", shell=True, check=True)
    return tmp_path


def write_params() -> None:
    Path("params.yaml").write_text(dump(compose([])), encoding="utf-8")


def make_point(number: int, *overrides: str, state: State = State.finished, loss: float = 2.0, **more: object) -> Point:
    folder = Path("multirun/ranks") / f"{number:03d}"
    settings = dataclasses.asdict(compose_config(overrides))
    command = " ".join(["python -m stages.point", *overrides])
    point = Point(folder, number, list(overrides), {}, command, settings, state, fingerprint=f"{number:064x}")
    point.reason = str(more["reason"]) if "reason" in more else None
    folder.mkdir(parents=True)
    point.save()
    if state is State.finished:
        write_json(folder / "metrics/evaluate.json", {"adapter": {"loss": loss}})
        write_json(folder / "metrics/train.json", {"validation_loss": loss + 1})
    names = sorted(path.parent.name for path in folder.parent.glob("*/point.json"))
    Sweep(folder.parent, "python -m stages.train -m", "local", points=names).save()
    return point


def decisive(settings: config.RunConfig) -> dict[str, object]:
    return {name: getattr(settings, name) for name in adopted_config.DECISIVE}


def texts(project: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in [*project.glob("conf/**/*.yaml"), project / "params.yaml"]}


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora=attention", "lora.r=4", "train.seed=0", "runtime.device=cpu"],  # the seed is so already
        ["lora.target_modules=[q_proj,v_proj]", "lora.lora_alpha='${mul:3,${.r}}'", "data.columns.output=1e3"],
        ["experiment=precision", "lora.r=2", "merge.dtype=bfloat16", "gate=improvement"],
        ["data=local", "data.path=/x", "data.files.train=a.jsonl", "quantization=none", "train=lora"],
        ["lora=by_layer", "lora.r=4"],
        ["+lora.rank_pattern={q_proj:4}"],
    ],
    ids=" ".join,
)
def test_the_project_gets_the_points_settings(project: Path, overrides: list[str]) -> None:
    wanted, before = compose_config(overrides), texts(project)
    make_point(0, *overrides)
    adopt.main(["multirun/ranks", "0"])
    found = compose_config()
    assert decisive(found) == decisive(wanted)
    assert (found.merge, found.gate) == (wanted.merge, wanted.gate)
    check_params()
    after, main = texts(project), project / "conf/config.yaml"
    assert after[main] == before[main].replace(LINE, b"  - experiment: adopted\n") != before[main]
    changed = {path.name for path in after if before.get(path) != after[path]}
    assert changed <= {"config.yaml", "adopted.yaml", "params.yaml"}


def test_what_is_adopted_says_where_it_comes_from_and_can_be_worked_on(project: Path) -> None:
    make_point(0, "lora=attention", "lora.r=4", loss=2.125)
    adopt.main(["multirun/ranks", "000"])
    text = adopted_config.ADOPTED.read_text()
    assert text.startswith("# @package _global_\n# Adopted from multirun/ranks/000 on 2")
    for said in ("test loss 2.125 nats", f"{0:064x}", "python -m stages.point lora=attention lora.r=4"):
        assert said in text
    body = [line for line in text.splitlines() if not line.startswith("#")]
    assert body == ["defaults:", "  - override /lora: attention", "lora:", "  r: 4"]
    assert compose_config(["lora.r=32"]).lora.lora_alpha == 64  # follows the rank as before
    assert compose_config(["lora=mlp"]).lora.target_modules == "mlp"


def test_an_experiments_axes_are_left_behind(project: Path) -> None:
    axes = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      lora.r: 1,2\ntrain:\n  max_steps: 7\n"
    (project / "conf/experiment/axes.yaml").write_text(axes)
    make_point(0, "experiment=axes", "lora.r=2")
    adopt.main(["multirun/ranks", "0"])
    (project / "conf/experiment/axes.yaml").unlink()
    assert (compose_config().train.max_steps, compose_config().lora.r) == (7, 2)
    assert "sweeper" not in adopted_config.ADOPTED.read_text()


def test_another_point_replaces_it_and_undo_goes_back_to_the_first_state(project: Path) -> None:
    main = project / "conf/config.yaml"
    main.write_bytes(main.read_bytes().replace(LINE, b"  - experiment: precision   # ours\r\n"))
    write_params()
    before = texts(project)
    first = make_point(0, "lora.r=4", "merge.dtype=bfloat16")
    adopt.main(["multirun/ranks", "0"])
    assert b"  - experiment: adopted   # ours\r\n" in main.read_bytes()
    assert compose_config().train.optimizer == "adamw_8bit"  # of `precision`
    second = make_point(1, "train.seed=1")  # of a sweep over what is adopted now
    adopt.main(["multirun/ranks", "1"])
    assert decisive(compose_config()) == decisive(second.config)
    assert compose_config().lora.r == 4
    assert compose_config().merge != first.config.merge  # the second did not ask for it
    adopt.main(["--undo"])
    assert texts(project) == before


def test_a_dry_run_says_it_and_writes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_point(0, "lora.r=4")
    before = texts(project)
    adopt.main(["multirun/ranks", "0", "--dry-run"])
    assert texts(project) == before
    said = capsys.readouterr().out
    assert "nothing is written" in said
    assert "  lora.r: 8 -> 4\n  lora.lora_alpha: 16 -> 8\n" in said


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    before = texts(Path.cwd())
    with pytest.raises(SystemExit) as error:
        adopt.main(arguments)
    assert error.value.code == 1
    assert texts(Path.cwd()) == before
    return capsys.readouterr().err


def test_points_that_cannot_be_adopted_are_refused_with_a_list(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_point(0, "lora.r=4", loss=2.5)
    make_point(1, "lora.r=64", state=State.failed, reason="out of memory")
    good = "000  finished  test loss 2.5000  validation loss 3.5000  lora.r=4"
    for name, said in (
        ("1", "failed (out of memory)"),
        ("7", "no point 7"),
        ("x", "no point x"),
        ("", "give the point"),
    ):
        message = refused(["multirun/ranks", *([name] if name else [])], capsys)
        assert said in message
        assert good in message
    assert "There are: multirun/ranks" in refused(["multirun/rank", "1"], capsys)
    assert "nothing to undo" in refused(["--undo"], capsys)


def test_a_hand_edit_of_params_is_refused_and_one_of_conf_is_not(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point = make_point(0, "lora.r=4")
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("  r: 8", "  r: 33"))
    assert "lora.r: 33 in params.yaml, 8 composed" in refused(["multirun/ranks", "0"], capsys)
    params.write_text(params.read_text().replace("  r: 33", "  r: 8"))
    for file, old, new in (("merge/training", ": 5000", ": 400"), ("train/base", "seed: 0", "seed: 5")):
        path = project / f"conf/{file}.yaml"
        path.write_text(path.read_text().replace(old, new))
    adopt.main(["multirun/ranks", "0"])
    assert decisive(compose_config()) == decisive(point.config)  # as it was trained
    assert compose_config().merge.parity_num_tokens == 400  # the edit is kept


def test_values_that_win_over_an_experiment_are_seen_before_anything_is_written(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = project / "conf/config.yaml"
    main.write_text(main.read_text() + "\nlora:\n  r: 3\n")
    write_params()
    make_point(0, "lora.r=4")
    message = refused(["multirun/ranks", "0"], capsys)
    assert "lora.r: 3 instead of 4" in message
    assert "conf/config.yaml itself" in message


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("config.yaml", LINE.decode(), "", "0 lines choose an experiment"),
        ("experiment/adopted.yaml", "", "# @package _global_\n# mine\n{}\n", "not written by pipeline.adopt"),
        ("lora/attention.yaml", None, "", "does not fit conf/ as it is now"),
    ],
)
def test_a_conf_that_does_not_fit_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str], file: str, old: str | None, new: str, said: str
) -> None:
    make_point(0, "lora=attention")
    path = project / "conf" / file
    if old is None:
        path.unlink()
    else:
        path.write_text((path.read_text() if path.exists() else "").replace(old, new, 1))
    assert said in refused(["multirun/ranks", "0"], capsys)


def test_all_is_put_back_when_writing_fails(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point, before = make_point(0, "lora.r=4"), texts(project)
    plan = adopted_config.plan_adoption(point, [])
    monkeypatch.setattr(adopted_config, "dump", lambda _: "something else")
    with pytest.raises(ConfigError, match="put back"):
        adopted_config.write(plan)
    assert texts(project) == before
    monkeypatch.undo()
    assert adopted_config.dump is dump


def stored(settings: config.RunConfig) -> str:
    """A finished result of these settings in the store; its fingerprint."""
    inputs = training_inputs(settings, "base", "data")
    with store.locked(fingerprint(inputs)) as folder:
        (store.new_adapter_folder(folder) / "adapter_model.safetensors").write_bytes(b"weights")
        store.finish(folder, {"metrics": {}, "history": [], "inputs": inputs})
    return folder.name


def test_it_says_why_the_stored_adapter_would_not_be_taken(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = compose_config(["lora.r=4"])
    key = stored(settings)
    assert adopt.reasons_to_train(settings, key, inputs_made=False) == []
    assert "does prepare first" in adopt.foresee(settings, key, ["prepare"])
    other = compose_config(["lora.r=4", "train.seed=1"])
    assert adopt.reasons_to_train(other, key, inputs_made=False) == ["settings.train.seed: 0 then, 1 now"]
    (project / "data/processed").mkdir(parents=True)
    (project / "models/quantized").mkdir(parents=True)
    for split in ("train", "validation"):
        (project / f"data/processed/{split}.arrow").write_bytes(b"rows")
    reasons = adopt.reasons_to_train(settings, key, inputs_made=True)
    assert [line.partition(":")[0] for line in reasons] == ["base", "data"]
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.fingerprint.code_hash", lambda _: "new code")
        (reason,) = adopt.reasons_to_train(settings, key, inputs_made=False)
        assert re.fullmatch("code: [0-9a-f]{64} then, new code now", reason)
        assert "will train it again" in adopt.foresee(settings, key, ["prepare"])
    (store.entry(key) / "adapter/adapter_model.safetensors").write_bytes(b"altered")
    assert "no valid result" in adopt.reasons_to_train(settings, key, inputs_made=False)[0]
    assert "no valid result" in adopt.reasons_to_train(settings, "0" * 64, inputs_made=False)[0]


def test_the_comparisons_choice_is_taken_while_it_is_of_these_points(project: Path) -> None:
    make_point(0, "lora.r=4")
    make_point(1, "lora.r=2")
    sweep = Sweep.load(Path("multirun/ranks"))
    with pytest.raises(DataError, match=r"Run `python -m pipeline.compare multirun/ranks`"):
        adopt.chosen_point(sweep, "best")
    settings = [{"point": name, "points": {"0": name}} for name in ("000", "001")]
    found = {"best": settings[0], "smallest": settings[1], "groups": [{"settings": settings}], "not_compared": []}
    write_json(sweep.folder / "comparison/settings.json", found)
    assert adopt.chosen_point(sweep, "best") == "000"
    adopt.main(["multirun/ranks", "--smallest"])
    assert compose_config().lora.r == 2
    make_point(2, "lora.r=1")
    with pytest.raises(DataError, match="made before 002 finished"):
        adopt.chosen_point(Sweep.load(sweep.folder), "best")
