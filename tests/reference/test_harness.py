"""The lm-evaluation-harness on a local task, against the project's own evaluation of the same rows; no network."""

import ast
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing

from pipeline import harness, tracking
from pipeline.conversations import Conversation
from pipeline.dataset import load_split, write_split
from pipeline.encoding import Encoder
from pipeline.errors import ConfigError, DataError, TrackingError
from pipeline.evaluation import answer_rows
from pipeline.files import read_json
from pipeline.generation import plain_model
from pipeline.harness import measure_tasks
from pipeline.harness_scores import Score, read_scores, table
from pipeline.harness_tasks import LOCAL, Tasks, write_local_task
from pipeline.losses import measure_rows
from pipeline.project_models import ProjectModels
from pipeline.schema import TooLong
from tests.chat_templates import family_tokenizer
from tests.conftest import ROOT
from tests.records import make_record, settings
from tests.standins import CPU, make_model

NUM_ROWS, NUM_NEW, BATCH_SIZE = 7, 8, 3
EVALUATE = dataclasses.replace(settings().evaluate, max_new_tokens=NUM_NEW, batch_size=BATCH_SIZE, max_rows=None)


def answers(model, tokenizer, split) -> list[dict]:
    return answer_rows(model, tokenizer, split, EVALUATE, name="test", progress=False)


@pytest.fixture(scope="module")
def tokenizer():
    """Puts <s> before plain text; the chat template does not, and ends prompts with a newline."""
    made = family_tokenizer("chatml")
    made.add_special_tokens({"bos_token": "<s>", "pad_token": "<pad>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    assert made("a")["input_ids"][0] == made.bos_token_id
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two random models, of other weights."""
    return [make_model(tmp_path_factory.mktemp("model"), seed=seed, max_position_embeddings=256) for seed in (0, 1)]


@pytest.fixture(scope="module")
def processed(tmp_path_factory, tokenizer, models) -> Path:
    """A test split; of every second row a reference is what the first model answers, with white space around it."""
    folder = tmp_path_factory.mktemp("processed")
    conversations = [
        Conversation("f", i, ({"role": "user", "content": f"Question {i}" * i}, {"role": "assistant", "content": "Yes " * i}),
                     None, (), f"p{i}", f"r{i}")
        for i in range(1, NUM_ROWS + 2)
    ]  # fmt: skip
    rows = Encoder(tokenizer, 200, TooLong.drop, 0).encode(conversations).examples
    write_split(folder / "test.arrow", rows)
    own = answers(models[0], tokenizer, load_split(folder, "test"))
    for i in range(0, NUM_ROWS, 2):
        rows[i] = dataclasses.replace(rows[i], references=["another", f" {own[i]['prediction']}\n"])
    rows[3] = dataclasses.replace(rows[3], prompt=rows[3].prompt + "?")  # ids that its text does not give
    rows[-1] = dataclasses.replace(rows[-1], references=[])
    write_split(folder / "test.arrow", rows)
    return folder


@pytest.fixture(scope="module")
def split(processed):
    return load_split(processed, "test")


@pytest.fixture(scope="module")
def folder(processed, tokenizer, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("tasks")
    write_local_task(processed, made, tokenizer, NUM_NEW)
    return made


@pytest.fixture(scope="module")
def scores(folder, models, tokenizer, split) -> list[dict[str, Score]]:
    """By metric, of the first model, the second, and the first again, on the same tasks."""
    tasks = Tasks([LOCAL], folder)
    found = [measure_tasks(model, tokenizer, tasks, split, BATCH_SIZE, None) for model in (*models, models[0])]
    return [{score.metric: score for score in each} for each in found]


def test_log_likelihoods_are_minus_the_nats_of_our_evaluation(scores, models, split, tokenizer):
    own = [measure_rows(model, split.head(NUM_ROWS), BATCH_SIZE, tokenizer.pad_token_id) for model in models]
    for found, nats in zip(scores, own, strict=False):
        assert found["nats"].num_rows == NUM_ROWS  # the row without reference is left out
        assert found["nats"].value * NUM_ROWS == pytest.approx(nats.sum(), rel=1e-5)
        per_token = nats.sum() / split.head(NUM_ROWS).num_supervised.sum()
        assert found["token_perplexity"].value == pytest.approx(float(torch.tensor(per_token).exp()), rel=1e-5)
        assert found["nats"].stderr == pytest.approx(nats.std(ddof=1) / NUM_ROWS**0.5, rel=1e-5)
    assert abs(own[0].sum() - own[1].sum()) > 0.01 * own[0].sum()  # the models can be told apart
    assert scores[2] == scores[0]


def test_the_harness_by_itself_gives_other_figures(scores, models, tokenizer, folder):
    tasks = Tasks([f"{LOCAL}_loglikelihood"], folder)
    tasks.library, tasks.local = tasks.local, []
    nats = measure_tasks(models[0], tokenizer, tasks, None, BATCH_SIZE, None)[0]
    assert nats.metric == "nats"
    assert abs(nats.value - scores[0]["nats"].value) > 0.01 * nats.value


def test_exact_match_is_that_of_our_evaluation(scores, models, split, tokenizer):
    own = [answers(model, tokenizer, split) for model in models]
    means = [sum(row["exact_match"] for row in rows) / NUM_ROWS for rows in own]
    assert means[0] >= 4 / 7 > means[1]
    assert [found["exact_match"].value for found in scores] == pytest.approx([*means, means[0]])


def test_the_harness_is_fed_the_splits_token_ids(models, tokenizer, split, folder, monkeypatch):
    plain = plain_model(models[0])
    prompts = {tuple(split.prompt_ids(i).tolist()) for i in range(NUM_ROWS)}
    seen: list[tuple[int, ...]] = []
    generate = plain.generate

    def spy(input_ids, attention_mask, **options):
        seen.extend(tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask, strict=True))
        return generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(plain, "generate", spy)
    measure_tasks(plain, tokenizer, Tasks([f"{LOCAL}_generate"], folder), split, BATCH_SIZE, None)
    assert set(seen) == prompts
    stock = harness.library_model(plain, tokenizer, BATCH_SIZE)
    ids, _ = stock.tok_batch_encode([split.prompt(0)])
    assert ids[0, 0] == tokenizer.bos_token_id  # what HFLM by itself would feed: a begin token that training never saw
    assert ids[0, 1:].tolist() == split.prompt_ids(0).tolist()
    context, _ = stock._encode_pair(split.prompt(0), "Yes")
    assert context[1:] == split.prompt_ids(0).tolist()[:-1]  # and the prompt's newline moved into the answer


def test_the_models_generation_config_is_kept_out_and_put_back(models, tokenizer, split, folder, scores):
    inherited = models[0].generation_config
    inherited.repetition_penalty = 50.0
    found = measure_tasks(models[0], tokenizer, Tasks([f"{LOCAL}_generate"], folder), split, BATCH_SIZE, None)
    assert found[0].value == scores[0]["exact_match"].value
    assert models[0].generation_config is inherited
    inherited.repetition_penalty = None


def test_limit_takes_the_first_rows(models, tokenizer, split, folder):
    found = measure_tasks(models[0], tokenizer, Tasks([f"{LOCAL}_loglikelihood"], folder), split, BATCH_SIZE, 2)
    nats = measure_rows(models[0], split.head(2), BATCH_SIZE, tokenizer.pad_token_id)
    assert found[0].num_rows == 2
    assert found[0].value * 2 == pytest.approx(nats.sum(), rel=1e-5)


def test_a_prompt_is_never_cut(models, tokenizer, split, processed, tmp_path):
    write_local_task(processed, tmp_path, tokenizer, max_new_tokens=200)
    longest = max(len(split.prompt_ids(i)) for i in range(NUM_ROWS))
    with pytest.raises(
        ConfigError, match=rf"evaluate\.max_new_tokens: 200 .* evaluate\.max_new_tokens={256 - longest} "
    ):
        measure_tasks(models[0], tokenizer, Tasks([LOCAL], tmp_path), split, BATCH_SIZE, None)


def test_text_without_prompts_is_no_task(processed, tokenizer, tmp_path):
    split = load_split(processed, "test")
    rows = Encoder(tokenizer, 200, TooLong.drop, 0).encode([]).examples
    assert len(split) > len(rows)
    write_split(tmp_path / "test.arrow", rows)
    with pytest.raises(DataError, match=r"split test: no row has a prompt and a reference"):
        write_local_task(tmp_path, tmp_path / "tasks", tokenizer, NUM_NEW)


def test_data_that_cannot_be_had_names_its_task(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "tasks")
    task = yaml.safe_load((folder / f"{LOCAL}_generate.yaml").read_text())
    away = {"task": "far_away", "dataset_path": "nobody/nothing-here", "dataset_kwargs": {}}
    (tmp_path / "tasks/away.yaml").write_text(yaml.safe_dump(task | away))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"task far_away: its data cannot be had \(.*run this task once with network"):
        Tasks(["far_away"], tmp_path / "tasks")


def test_an_unknown_task_is_answered_with_the_nearest(folder, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))  # not all 13,000 files
    with pytest.raises(ConfigError, match=r"no such task\n  local_tst: did you mean local_test.*\n  xyz: `lm_eval ls"):
        Tasks([LOCAL, "local_tst", "xyz"], folder)


@pytest.mark.slow
def test_all_tasks_of_the_harness_are_known(folder):
    with pytest.raises(ConfigError, match=r"no such task\n  helaswag: did you mean .*hellaswag"):
        Tasks(["helaswag", "hellaswag", LOCAL], folder)


def test_scores_of_filters_and_without_standard_error():
    found = {"name": "gsm8k", "sample_len": 4, "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1}
    found |= {"word_perplexity,none": 9.0, "word_perplexity_stderr,none": "N/A"}
    strict, perplexity = read_scores("gsm8k", found)
    assert strict == Score("gsm8k", "exact_match.strict-match", 0.5, 0.1, 4)
    assert strict.interval == pytest.approx((0.304, 0.696))
    assert perplexity == Score("gsm8k", "word_perplexity", 9.0, None, 4)
    lines = table({"base": [strict, perplexity], "adapter": [strict]}).splitlines()
    assert [line.split()[1:3] for line in lines[1:4]] == [
        ["exact_match.strict-match", "base"],
        ["exact_match.strict-match", "adapter"],
        ["word_perplexity", "base"],
    ]
    assert "0.3040 to 0.6960" in lines[1]
    assert lines[3].split()[-2:] == ["-", "4"]


def test_results_are_written_and_added_to_the_adapters_run(
    project, models, tokenizer, processed, monkeypatch, caplog, capfd
):
    """Also where MLflow cannot be reached at first: the record waits, and `sync` sends it."""
    make_record(project)
    shutil.copytree(processed, project / "data/processed")
    config = settings(runtime__inputs_dir=".", runtime__tracking=True, runtime__device="cpu", runtime__progress=False)
    config.evaluate = EVALUATE
    monkeypatch.setattr(harness, "check_provenance", lambda *_: {})
    monkeypatch.setattr(harness, "load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(harness, "select_device", lambda _: CPU)
    monkeypatch.setattr(ProjectModels, "find", lambda self, name: Path(name))
    monkeypatch.setattr(ProjectModels, "load", lambda self, name: models[name == "adapter"])
    with monkeypatch.context() as patched:
        patched.setattr(tracking, "_import_mlflow", lambda: (_ for _ in ()).throw(TrackingError("no answer.")))
        printed = harness.run(config, [f"{LOCAL}_loglikelihood"], ["base", "adapter"], 3, Path())
    assert "it/s" not in capfd.readouterr().err
    metrics = read_json(project / "metrics/harness.json")
    assert metrics["base"] != metrics["adapter"]
    results = read_json(project / "reports/harness/results.json")
    assert {row["model"] for row in results["results"]} == {"base", "adapter"}
    assert f"{metrics['adapter'][f'{LOCAL}_loglikelihood']['nats']:.4f}" in printed
    from pipeline.tracking_push import find_run
    from pipeline.tracking_store import open_store

    def check_logged() -> None:
        logged = find_run(open_store(), read_json(project / "models/run.json")["fingerprint"]).data.metrics
        for model, tasks in metrics.items():
            assert logged[f"harness.{model}.{LOCAL}_loglikelihood.nats"] == tasks[f"{LOCAL}_loglikelihood"]["nats"]

    assert "python -m pipeline.tracking sync" in caplog.text
    assert "(from the outbox: harness)" in tracking.sync()[0]
    check_logged()
    config.runtime.progress = True
    harness.run(config, [f"{LOCAL}_loglikelihood"], ["adapter"], 2, Path())
    assert "it/s" in capfd.readouterr().err
    metrics = read_json(project / "metrics/harness.json")
    assert "base" not in metrics
    check_logged()


def test_without_the_extra_one_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert harness.main(["--tasks", LOCAL]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install" in error
    assert "'.[harness]'" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks local_test --limit 0", "--limit: must be 1 or more"),
        ("--tasks ,", "--tasks: names no task"),
        ("--tasks local_test --limit 1 lora.rr=3", "lora.rr: no such setting; did you mean lora.r?"),
    ],
)
def test_wrong_arguments_end_in_one_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        harness.main(arguments.split())
    assert left.value.code
    assert message in capsys.readouterr().err


def test_nothing_imports_it_at_the_start():
    """It takes seconds: only functions of these modules do."""
    for path in sorted((ROOT / "pipeline").glob("*.py")) + sorted((ROOT / "stages").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = tree.body if path.name in ("harness.py", "harness_tasks.py") else list(ast.walk(tree))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if name.split(".")[0] == "lm_eval"], path.name


def test_the_local_task_is_plain_yaml_and_rows(folder, split, tokenizer):
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == NUM_ROWS
    assert rows[1]["prompt"] == split.prompt(1)
    whole = tokenizer(rows[1]["prompt"] + rows[1]["completion"], add_special_tokens=False)["input_ids"]
    assert whole == split.input_ids(1).tolist()
    task = yaml.safe_load((folder / f"{LOCAL}_generate.yaml").read_text(encoding="utf-8"))
    assert task["generation_kwargs"] == {"until": [], "max_gen_toks": NUM_NEW, "do_sample": False}
