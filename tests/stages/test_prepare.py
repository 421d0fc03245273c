"""The prepare stage for real: its files, its command line, and the real data where it is there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import compose_config
from pipeline.dataset import load_split
from pipeline.errors import ModelError
from pipeline.workspace import Workspace
from stages.prepare import run
from tests.chat_templates import TEMPLATES, make_tokenizer
from tests.conftest import REAL, ROOT

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real models and data in {REAL}")


@pytest.fixture
def project(tmp_path: Path) -> list[str]:
    """Overrides that name a tiny data set and a base with a tokenizer."""
    base, data = tmp_path / "base", tmp_path / "data"
    make_tokenizer(TEMPLATES["qwen3"], "qwen3").save_pretrained(base)
    config = LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(base)
    data.mkdir()
    rows = [{"question": f"Question {i}", "answer": f"Answer {i}"} for i in range(60)]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    (data / "general.jsonl").write_text('{"text": "Words."}\n')
    return [
        "data=local", "model=local", f"model.path={base}", f"data.path={data}", "data.files.train=rows.jsonl",
        "data.columns.instruction=question", "data.columns.output=answer", "data.max_length=128",
        f"data.general_path={data}/general.jsonl", "runtime.progress=false",
    ]  # fmt: skip


def test_the_stage_writes_what_it_declares(project, tmp_path):
    run(compose_config(project), Workspace(tmp_path, tmp_path / "out"))
    written = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert written == [
        "data/processed/general.arrow", "data/processed/provenance.json", "data/processed/test.arrow",
        "data/processed/train.arrow", "data/processed/validation.arrow", "metrics/prepare.json",
        "reports/prepare/lengths.csv", "reports/prepare/quarantine.jsonl",
    ]  # fmt: skip
    metrics = json.loads((tmp_path / "out/metrics/prepare.json").read_text())
    assert sum(metrics[name]["num_rows"] for name in ("train", "validation", "test")) == 60
    assert metrics["quarantined"]["bad_json"] == 1
    provenance = json.loads((tmp_path / "out/data/processed/provenance.json").read_text())
    assert set(provenance["settings"]) == {"data", "model"}


def test_a_base_that_cannot_be_used_is_refused_before_the_data_is_read(project, tmp_path):
    weights = tmp_path / "base" / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        run(compose_config(project), Workspace(tmp_path, tmp_path / "out"))
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "base/config.json").read_text())
    small = LlamaForCausalLM(LlamaConfig(**{**config, "vocab_size": 100}))
    small.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="the model embeddings for 100"):
        run(compose_config(project), Workspace(tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out/data/processed").exists()


def test_a_mistake_gives_one_message_and_exit_code_1(project, tmp_path):
    wrong = [*project, "data.columns.output=answers", f"runtime.output_dir={tmp_path}/out"]
    done = subprocess.run(
        [sys.executable, "-m", "stages.prepare", *wrong], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "data.columns.output: rows.jsonl has no column 'answers'; it has answer, question" in done.stderr
    assert "Traceback" not in done.stderr


def test_worker_processes_change_no_byte(project, tmp_path):
    rows = "".join(json.dumps({"question": f"Question {i}", "answer": f"Answer {i}"}) + "\n" for i in range(3000))
    (tmp_path / "data/rows.jsonl").write_text(rows)
    for workers in (1, 2):
        run(
            compose_config([*project, f"runtime.num_workers={workers}"]),
            Workspace(tmp_path, tmp_path / f"with_{workers}"),
        )
    files = [path.relative_to(tmp_path / "with_1") for path in (tmp_path / "with_1").rglob("*") if path.is_file()]
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "with_1" / file).read_bytes() == (tmp_path / "with_2" / file).read_bytes(), file


@needs_real
def test_e2e_on_stories260k(tmp_path):
    files = ["data.files.train=train.jsonl", "data.files.validation=valid.jsonl", "data.files.test=test.jsonl"]
    model = ["model=local", f"model.path={REAL}/models/stories260K"]
    config = compose_config(
        ["data=local", *model, f"data.path={REAL}/e2e", *files, "data.max_rows=500", "runtime.progress=false"]
    )
    run(config, Workspace(tmp_path, tmp_path))
    metrics = json.loads((tmp_path / "metrics/prepare.json").read_text())
    assert metrics["num_raw_rows"] == 42_061 + 4_672 + 630 + 300
    assert metrics["quarantined"]["duplicate"] == 1_202 + 151
    assert metrics["quarantined"]["prompt_in_train"] == 0
    assert [metrics[name]["num_rows"] for name in ("train", "validation", "test")] == [500, 4_521, 630]
    test = load_split(tmp_path / "data/processed", "test")
    assert len(test.references(0)) > 1
    assert test.input_ids(0)[0] == 1
    assert test.input_ids(0)[-1] == 2


@needs_real
def test_tinyshakespeare_on_babyllama361(tmp_path):
    overrides = [
        "data=local", "model=local", f"model.path={REAL}/models/babyllama361", f"data.path={REAL}/tinyshakespeare",
        "data.files.train=input.txt", "data.shape=text", "data.max_length=256", "evaluate=loss_only",
        "runtime.progress=false",
    ]  # fmt: skip
    run(compose_config(overrides), Workspace(tmp_path, tmp_path))
    metrics = json.loads((tmp_path / "metrics/prepare.json").read_text())
    supervised = sum(metrics[name]["num_supervised_tokens"] for name in ("train", "validation", "test"))
    assert 1_115_394 <= supervised <= 1_115_394 + 10  # each character once; a space before each of the three parts


@needs_real
@pytest.mark.parametrize("too_long", ["drop", "truncate_prompt"])
def test_alpaca_on_stories260k(tmp_path, too_long):
    overrides = [
        "data=local", "model=local", f"model.path={REAL}/models/stories260K",
        f"data.path={REAL}/alpaca/alpaca_en_demo.json",
        "data.files.train=alpaca_en_demo.json", f"data.too_long={too_long}", "runtime.progress=false",
    ]  # fmt: skip
    run(compose_config(overrides), Workspace(tmp_path, tmp_path))
    metrics = json.loads((tmp_path / "metrics/prepare.json").read_text())
    count = lambda key: sum(metrics[name][key] for name in ("train", "validation", "test"))
    assert count("num_rows") + count("num_too_long_dropped") + metrics["num_quarantined"] == 999
    assert metrics["quarantined"]["duplicate"] == 14
    assert (count("num_too_long_truncated") > 10) == (too_long == "truncate_prompt")
    assert max(metrics[name]["length_max"] for name in ("train", "validation", "test")) <= 512
