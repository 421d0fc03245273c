"""The DAG under real DVC in a real git repository: what is rebuilt, what is not, and what is refused."""

import json
import time
from pathlib import Path

import pytest

from pipeline.imports import ROOT, imported_files, with_code_deps
from tests.conftest import Project, copy_project

STAGES = ["check", "prepare", "quantize", "train", "evaluate", "merge", "report", "gate"]


def ran(output: str) -> list[str]:
    """The stages that DVC really ran, not those answered from its cache."""
    return [name for name in STAGES if f"Running stage '{name}'" in output]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project with few rows and steps, built once."""
    project = copy_project(tmp_path_factory.mktemp("project"))
    make_small(project)
    assert ran(project.run("dvc repro")) == STAGES
    project.commit("built")
    return project


def make_small(project: Project) -> None:
    """Few rows, few steps, short answers: seconds a stage."""
    project.edit("conf/train/qlora.yaml", "max_steps: ", "max_steps: 8  # was ")
    project.edit("conf/train/base.yaml", "micro_batch_size: ", "micro_batch_size: 4  # was ")
    project.edit("conf/evaluate/default.yaml", "general_max_rows: null", "general_max_rows: 8")
    project.edit("conf/evaluate/default.yaml", "\nmax_rows: null", "\nmax_rows: 8")
    project.edit("conf/evaluate/default.yaml", "max_new_tokens: ", "max_new_tokens: 8  # was ")
    project.edit("conf/data/base.yaml", "max_rows: null", "max_rows: 400")
    for split in ("validation", "test"):
        path = project.folder / "assets" / "contracts" / f"{split}.jsonl"
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:40]), encoding="utf-8")
    project.run("python -m pipeline.config")
    project.commit("small")


def metrics(project: Project, name: str) -> dict:
    return json.loads((project.folder / "metrics" / f"{name}.json").read_text())


def test_every_stage_leaves_its_metrics(project: Project) -> None:
    evaluate, merge = metrics(project, "evaluate"), metrics(project, "merge")
    assert (
        evaluate["base"].keys() == evaluate["quantized"].keys() == evaluate["adapter"].keys() == merge["merged"].keys()
    )
    assert merge["mean_kl"] < 1e-6
    assert merge["top1_agreement"] >= 0.9999
    assert metrics(project, "train")["validation_loss"] < metrics(project, "train")["validation_loss_before"]


def test_a_second_repro_does_nothing_in_under_3_seconds(project: Project) -> None:
    seconds = []
    for _ in range(3):  # the machine may be busy with something else
        started = time.perf_counter()
        output = project.run("dvc repro")
        seconds.append(time.perf_counter() - started)
        assert ran(output) == []
    assert min(seconds) < 3, seconds


def test_an_experiment_rebuilds_what_it_changes_and_a_change_back_trains_nothing(project: Project) -> None:
    output = project.run("dvc exp run -S lora.r=16")
    assert ran(output) == ["check", "train", "evaluate", "merge", "report", "gate"]
    assert json.loads((project.folder / "models/adapter/adapter_config.json").read_text())["r"] == 16
    output = project.run("dvc exp run")
    assert "train" not in ran(output)
    assert json.loads((project.folder / "models/adapter/adapter_config.json").read_text())["r"] == 8
    assert "lora.r" in project.run("dvc exp show --csv").splitlines()[0]


def test_a_merge_setting_reruns_the_merge_and_what_follows(project: Project) -> None:
    output = project.run("dvc exp run -S merge.dtype=bfloat16")
    assert [stage for stage in ran(output) if stage != "check"] == ["merge", "report", "gate"]
    project.run("git checkout -q . && dvc checkout -q")


def test_a_failed_gate_fails_the_repro_and_loses_nothing(project: Project) -> None:
    project.edit("conf/gate/none.yaml", "conditions: []", "conditions: [adapter.loss <= 0.5 * base.loss]")
    project.run("python -m pipeline.config")
    output = project.run("dvc repro", ok=False)
    assert ran(output) == ["check", "report", "gate"]
    assert "1 of 1 conditions failed" in output
    assert "FAILED  adapter.loss <= 0.5 * base.loss" in output
    assert "Traceback" not in output
    status = project.run("dvc status")
    assert "gate:" in status
    assert "report:" not in status  # committed
    assert "NOT passed" in (project.folder / "reports/evaluate/index.html").read_text()
    project.run("""dvc exp run -n kept -S 'gate.conditions=["adapter.loss <= 0.4 * base.loss"]'""")
    assert metrics(project, "gate")["passed"] is False
    assert "kept" in project.run("dvc exp list --name-only")
    project.run("git checkout -q . && dvc checkout -q")


def test_an_edit_in_conf_is_not_ignored(project: Project) -> None:
    project.edit("conf/lora/all_linear.yaml", "r: 8", "r: 4")
    output = project.run("dvc repro", ok=False)
    assert "lora.r: 8 in params.yaml, 4 composed from conf/" in output
    assert "make params" in output
    assert "Traceback" not in output
    project.run("git checkout -q .")


def test_a_hand_edit_of_params_is_not_lost(project: Project) -> None:
    project.edit("params.yaml", "  r: 8", "  r: 33")
    for command in ("dvc repro", "dvc exp run", "dvc exp run --queue -S train.seed=3"):
        output = project.run(command, ok=False)
        assert "lora.r: 33 in params.yaml, 8 composed from conf/" in output
        assert "Traceback" not in output
    assert "  r: 33" in (project.folder / "params.yaml").read_text()
    project.run("git checkout -q .")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.rr=8", "did you mean lora.r?"),
        ("train.learning_rat=1", "train.learning_rate"),
        ("lora.r=abc", "lora.r"),
        ("lora.r=0", "at least 1"),
    ],
)
def test_a_typo_stops_at_once(project: Project, override: str, said: str) -> None:
    for command in (f"dvc exp run -S {override}", f"python -m stages.train {override}"):
        output = project.run(command, ok=False, timeout=60)
        assert said in output
        assert "Traceback" not in output
        assert "dvc.org/support" not in output
        assert "Running stage" not in output
    assert project.run("git status --porcelain params.yaml conf") == ""


def test_dvc_composes_the_same_bytes(project: Project) -> None:
    before = (project.folder / "params.yaml").read_bytes()
    (project.folder / "params.yaml").write_text("")
    project.run("git commit -qam 'empty params' && dvc exp run check")
    assert (project.folder / "params.yaml").read_bytes() == before
    project.run("git reset -q --hard HEAD~1 && dvc checkout -q")


def test_by_hand_writes_elsewhere_and_refuses_inputs_of_other_settings(project: Project) -> None:
    before = project.run("git status --porcelain; md5sum models/adapter/* metrics/*")
    project.run("python -m stages.train train.max_steps=2 runtime.output_dir=outputs/mine")
    assert (project.folder / "outputs/mine/models/adapter/adapter_model.safetensors").exists()
    assert project.run("git status --porcelain; md5sum models/adapter/* metrics/*") == before
    output = project.run("python -m stages.train data.max_length=200", ok=False)
    assert "data.max_length: made with 320, now 200" in output
    assert "Traceback" not in output


def test_code_deps_are_what_the_stages_import() -> None:
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert with_code_deps(text) == text
    assert Path("pipeline/losses.py") in imported_files("stages.train")
    assert Path("pipeline/merging.py") not in imported_files("stages.train")


def test_a_missing_code_dep_would_be_seen() -> None:
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    without = "".join(line for line in text.splitlines(keepends=True) if "pipeline/losses.py" not in line)
    assert with_code_deps(without) == text != without


@pytest.mark.slow
def test_a_queued_experiment_trains_in_a_temporary_folder_and_keeps_its_run(project: Project) -> None:
    project.run("dvc exp run --queue -S train.seed=7,8")
    project.run(
        "dvc queue start && timeout 250 sh -c 'until dvc queue status | grep -q \"No experiment\\|Success\"; do sleep 3; done'"
    )
    project.run("timeout 250 sh -c 'while dvc queue status | grep -q \"Running\\|Queued\"; do sleep 3; done'")
    shown = json.loads(project.run("dvc exp show --json"))
    text = json.dumps(shown)
    assert '"seed": 7' in text
    assert '"seed": 8' in text
