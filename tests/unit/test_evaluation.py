"""What evaluate_model measures and keeps, and the reports made of it."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from pipeline.dataset import Example, load_split, write_split
from pipeline.errors import DataError, ModelError
from pipeline.evaluation import evaluate_model, measure_contamination
from pipeline.evidence import Evidence, join_answers, join_items
from pipeline.losses import measure_loss
from pipeline.schema import EvaluateConfig

EVALUATE = EvaluateConfig(
    max_rows=None, batch_size=3, generate=True, max_new_tokens=5, general_max_rows=None, contamination_ngram=13, harness_tasks=[], harness_limit=None,
    contamination_share=0.8,
)  # fmt: skip
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
    """The scores and the answers."""
    settings = EvaluateConfig(**{**vars(EVALUATE), **changes})
    found = evaluate_model(model, tokenizer, folder, settings, name="base", progress=False)
    return Evidence(join_items({"base": found}), num_resamples=1).values("base"), found.answers


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


@pytest.mark.parametrize(("limit", "warns"), [(4, True), (5, False)])
def test_answers_longer_than_the_limit_are_told(tiny_llama, tokenizer, tmp_path, caplog, limit, warns):
    """The longest right answer has 5 tokens and its end."""
    write_processed(tmp_path, [["w5 w6"], ["w7"], ["w5"]])
    evaluate(tiny_llama, tokenizer, tmp_path, max_new_tokens=limit)
    assert ("right answers have up to 5 tokens" in caplog.text) is warns


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


def test_the_loss_of_rows_is_the_loss_of_the_split(tiny_llama, tokenizer, tmp_path):
    write_processed(tmp_path, [["w5"], ["w6"], ["w7"], ["w8"]])
    found = evaluate_model(tiny_llama, tokenizer, tmp_path, EVALUATE, name="base", progress=False)
    test = load_split(tmp_path, "test")
    for i, item in enumerate(found.test):
        alone = tiny_llama(torch.tensor(test.input_ids(i))[None].long()).logits[0, :-1].double().log_softmax(-1)
        targets = torch.tensor(test.input_ids(i)[1:]).long()
        nats = -alone[torch.arange(len(targets)), targets][torch.tensor(test.completion_mask(i)[1:]).bool()].sum()
        assert item["sums"]["loss"] == [pytest.approx(float(nats), rel=1e-5), int(test.num_supervised[i])]
    total = sum(item["sums"]["loss"][0] for item in found.test)
    assert measure_loss(tiny_llama, test, 3, 0).loss == pytest.approx(total / int(test.num_supervised.sum()))


def test_rows_of_one_prompt_are_one_cluster(tiny_llama, tokenizer, tmp_path):
    write_processed(tmp_path, [["w5"], ["w6"]])
    found = evaluate_model(tiny_llama, tokenizer, tmp_path, EVALUATE, name="base", progress=False)
    assert found.test[0]["cluster"] == found.test[1]["cluster"]
    assert len({item["cluster"] for item in found.general}) == 3  # without a prompt each stands alone


def answer(row: int, prediction: str, rouge: float) -> dict:
    shared = {"row_id": f"test.jsonl:{row}", "prompt": "p", "references": ["r"]}
    return shared | {"prediction": prediction, "ended": True, "exact_match": False, "rouge_l": rouge}


def test_answers_of_all_models_side_by_side():
    answers = {
        "base": [answer(1, "x", 0.1), answer(2, "y", 0.5)],
        "adapter": [answer(1, "r", 0.9), answer(2, "z", 0.2)],
    }
    rows = join_answers(answers)
    assert [row["row_id"] for row in rows] == ["test.jsonl:1", "test.jsonl:2"]
    assert [rows[0][name]["prediction"] for name in ("base", "adapter")] == ["x", "r"]
    assert "prediction" not in rows[0]


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_test_row_seen_in_training_is_named(tmp_path, caplog, is_seen):
    write_processed(tmp_path, [["w5"], ["w6"]])
    test = load_split(tmp_path, "test")
    ids = test.input_ids(1).tolist() if is_seen else list(range(3, 12))
    mask = test.completion_mask(1).tolist() if is_seen else [0] * 4 + [1] * 5
    write_split(tmp_path / "train.arrow", [Example("train.jsonl:7", ids, mask, 4, "a prompt", ["w6"])])
    counts = measure_contamination(tmp_path, EVALUATE, tmp_path / "contamination.jsonl")
    assert counts == {"num_rows": 2, "num_seen": int(is_seen), "num_exact": int(is_seen)}
    rows = [json.loads(line) for line in (tmp_path / "contamination.jsonl").read_text().splitlines()]
    assert [row["row_id"] for row in rows if row["seen"]] == ["test.jsonl:2"] * is_seen
    assert ("1 of 2 test rows were seen in training (1 exactly)" in caplog.text) is is_seen
    assert not is_seen or rows[1]["train_row_id"] == "train.jsonl:7"


def test_a_model_that_overflows_is_named_with_the_row(tiny_llama, tokenizer, tmp_path):
    write_processed(tmp_path, [["w5"], ["w6"]])
    with torch.no_grad():
        tiny_llama.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match=r"base: the loss of 2 of 2 test rows is not finite, first of test\.jsonl:1"):
        evaluate(tiny_llama, tokenizer, tmp_path)
