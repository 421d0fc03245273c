"""What evaluate_model measures and keeps, and the reports made of it."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from pipeline.dataset import Example, write_split
from pipeline.errors import DataError
from pipeline.evaluation import evaluate_model, forgetting
from pipeline.evaluation_reports import join_rows, scores_csv, write_reports
from pipeline.schema import EvaluateConfig

EVALUATE = EvaluateConfig(max_rows=None, batch_size=3, generate=True, max_new_tokens=5, general_max_rows=None)
KEYS = {"loss", "perplexity", "num_tokens", "general_loss", "general_num_tokens"}
TASK_KEYS = {"exact_match", "rouge_l", "bleu"}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f" w{i}": i for i in range(3, 96)}
    core = Tokenizer(WordLevel(vocabulary, unk_token=" w3"))
    core.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", bos_token="<s>")


def write_processed(folder, references: list[list[str]]) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i, row_references in enumerate(references):
        ids = torch.randint(3, 96, (7 + i,), generator=generator).tolist()
        rows.append(Example(f"test.jsonl:{i + 1}", [*ids, 2], [0] * 4 + [1] * (4 + i), 4, "a prompt", row_references))
    write_split(folder / "test.arrow", rows)
    text = torch.randint(3, 96, (20,), generator=generator).tolist()
    windows = [Example(f"general:{i}", text[i:], [1] * (20 - i), 0, "", []) for i in range(3)]
    write_split(folder / "general.arrow", windows)


def evaluate(model, tokenizer, folder, **changes):
    settings = EvaluateConfig(**{**vars(EVALUATE), **changes})
    return evaluate_model(model, tokenizer, folder, settings, name="base", progress=False)


def test_every_row_is_kept_and_scored(tiny_llama, tokenizer, tmp_path):
    write_processed(tmp_path, [["w5 w6"], ["w7", "w8 w9"], ["w5"]])
    scores, rows = evaluate(tiny_llama, tokenizer, tmp_path)
    assert set(scores) == KEYS | TASK_KEYS
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["num_tokens"] == 4 + 5 + 6
    assert [row["row_id"] for row in rows] == ["test.jsonl:1", "test.jsonl:2", "test.jsonl:3"]
    assert rows[1]["references"] == ["w7", "w8 w9"]
    assert scores["exact_match"] == 0.0
    # with its own answers as references the same model scores 1
    write_processed(tmp_path, [["nothing like it", row["prediction"]] for row in rows])
    again, rows = evaluate(tiny_llama, tokenizer, tmp_path)
    assert (again["exact_match"], again["rouge_l"]) == (1.0, 1.0)
    assert all(row["exact_match"] and row["rouge_l"] == 1.0 for row in rows)
    assert again["loss"] == scores["loss"]


def test_equal_calls_give_equal_results(tiny_llama, tokenizer, tmp_path):
    write_processed(tmp_path, [["w5 w6"], ["w7"], ["w5"]])
    assert evaluate(tiny_llama, tokenizer, tmp_path) == evaluate(tiny_llama, tokenizer, tmp_path)


def test_without_generation_there_are_no_task_scores(tiny_llama, tokenizer, tmp_path, caplog):
    write_processed(tmp_path, [["w5"], ["w6"]])
    caplog.set_level("INFO")
    scores, rows = evaluate(tiny_llama, tokenizer, tmp_path, generate=False)
    assert (set(scores), rows) == (KEYS, [])
    assert "evaluate.generate is false" in caplog.text


def test_without_references_there_are_no_task_scores_and_it_is_said(tiny_llama, tokenizer, tmp_path, caplog):
    write_processed(tmp_path, [[], []])
    caplog.set_level("INFO")
    scores, rows = evaluate(tiny_llama, tokenizer, tmp_path)
    assert (set(scores), rows) == (KEYS, [])
    assert "no test row has a prompt and a reference" in caplog.text


def test_rows_without_references_are_left_out_of_the_scores_and_counted(tiny_llama, tokenizer, tmp_path, caplog):
    write_processed(tmp_path, [["w5"], [], ["w6"]])
    caplog.set_level("INFO")
    _, rows = evaluate(tiny_llama, tokenizer, tmp_path)
    assert [row["row_id"] for row in rows] == ["test.jsonl:1", "test.jsonl:3"]
    assert "1 of 3 test rows, without reference, not scored" in caplog.text


def test_limits_on_rows(tiny_llama, tokenizer, tmp_path):
    write_processed(tmp_path, [["w5"], ["w6"], ["w7"]])
    scores, rows = evaluate(tiny_llama, tokenizer, tmp_path, max_rows=2, general_max_rows=1)
    assert (len(rows), scores["num_tokens"], scores["general_num_tokens"]) == (2, 9, 19)


def test_a_missing_split_is_named(tiny_llama, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"test\.arrow: no such file"):
        evaluate(tiny_llama, tokenizer, tmp_path)


def test_forgetting_is_the_rise_of_the_general_loss():
    assert forgetting({"general_loss": 2.0, "loss": 9.0}, {"general_loss": 2.5, "loss": 1.0}) == 0.5


def answer(row: int, prediction: str, rouge: float) -> dict:
    shared = {"row_id": f"test.jsonl:{row}", "prompt": "p", "references": ["r"]}
    return shared | {"prediction": prediction, "ended": True, "exact_match": False, "rouge_l": rouge}


def test_reports(tmp_path):
    rows = {"base": [answer(1, "x", 0.1), answer(2, "y", 0.5)], "adapter": [answer(1, "r", 0.9), answer(2, "z", 0.2)]}
    scores = {name: {"loss": 2.0, "exact_match": 0.5, "bleu": 10.0, "general_loss": 3.0} for name in rows}
    write_reports(tmp_path, scores, rows)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert lines == join_rows(rows)
    assert lines[0]["row_id"] == "test.jsonl:1"
    assert [lines[0][name]["prediction"] for name in ("base", "adapter")] == ["x", "r"]
    assert "prediction" not in lines[0]
    assert scores_csv(scores).splitlines() == [
        "model,loss,exact_match,bleu,general_loss", "base,2.0,0.5,10.0,3.0", "adapter,2.0,0.5,10.0,3.0",
    ]  # fmt: skip
    pictures = {name: (tmp_path / name).read_bytes() for name in ("scores.png", "improvement.png")}
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())
    write_reports(tmp_path / "again", scores, rows)
    assert all((tmp_path / "again" / name).read_bytes() == data for name, data in pictures.items())


def test_reports_without_answers(tmp_path):
    write_reports(tmp_path, {"base": {"loss": 2.0}, "adapter": {"loss": 1.0}}, {"base": [], "adapter": []})
    assert (tmp_path / "predictions.jsonl").read_text() == ""
    assert not (tmp_path / "improvement.png").exists()
