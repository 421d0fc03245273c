"""The plan as a user runs it, and stages that stop before they fetch or load anything."""

import json

import pytest

import stages.prepare
import stages.quantize
from pipeline import fit_check, modeling
from pipeline.config import compose_config
from pipeline.errors import ConfigError
from pipeline.workspace import Workspace
from tests.conftest import ROOT, Project
from tests.small_project import watch_loads


@pytest.mark.parametrize("stage", [stages.prepare, stages.quantize])
def test_a_stage_stops_before_it_reads_the_base(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_check, "total_bytes", lambda device: 1_000_000)
    loads = watch_loads(monkeypatch)
    monkeypatch.setattr(modeling, "tensor_shapes", lambda folder: pytest.fail("the weights were looked at"))
    config = compose_config(["runtime.device=cpu", "runtime.progress=false"])
    with pytest.raises(ConfigError, match="cannot fit"):
        stage.run(config, Workspace(tmp_path, tmp_path))
    assert not loads
    assert not list(tmp_path.rglob("*.arrow"))


@pytest.mark.slow
def test_llama_3_8b_on_a_card_of_24_gb():
    project = Project(ROOT)  # it writes nothing
    command = "python -m pipeline.plan model=llama3_8b quantization.compute_dtype=bfloat16 --gpu 24GB --json"
    plan = json.loads(project.run(f"{command} 2>/dev/null"))
    assert plan["num_parameters"] == 8_030_261_248
    assert not plan["columns"]["full"]["recomputed"]["fits"]
    assert plan["columns"]["qlora"]["recomputed"]["fits"]
    weights = plan["columns"]["qlora"]["kept"]["memory"]["weights"]
    # 6,979,321,856 weights of layers in 4 bits, 1,050,939,392 others in 16
    assert weights == pytest.approx(6_979_321_856 / 2 + 2 * 1_050_939_392, rel=1e-3)
