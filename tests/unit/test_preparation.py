"""Splitting, sorting out and counting: from raw files to processed splits."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.conversations import Conversation, Document
from pipeline.dataset import load_split
from pipeline.errors import ConfigError, DataError
from pipeline.preparation import Outputs, length_histogram, prepare
from pipeline.quarantine import Quarantine
from pipeline.schema import Columns, DataConfig, Shape, SplitFiles, TooLong
from pipeline.splits import remove_duplicates, remove_leaks, split_rows, split_text, take_rows
from tests.chat_templates import TEMPLATES, make_tokenizer

NAMES = ("instruction", "input", "output", "prompt", "completion", "messages", "text", "references", "system")


def settings(folder: Path, **changes) -> DataConfig:
    (folder / "general.jsonl").write_text('{"text": "Some general words."}\n')
    values = {
        "path": str(folder),
        "hub_id": None,
        "hub_config": None,
        "revision": None,
        "files": SplitFiles("train.jsonl", None, None),
        "shape": Shape.instruction,
        "columns": Columns(**{name: name for name in NAMES}),
        "system_prompt": None,
        "max_length": 200,
        "too_long": TooLong.drop,
        "text_overlap": 0,
        "validation_share": 0.2,
        "test_share": 0.2,
        "max_rows": None,
        "max_bad_share": 0.5,
        "general_path": str(folder / "general.jsonl"),
    }
    return DataConfig(**(values | changes))


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def raw(number: int, answer: int = 0) -> dict:
    return {"instruction": f"Question {number}", "input": "", "output": f"Answer {number}.{answer}"}


def outputs(folder: Path) -> Outputs:
    return Outputs(folder / "processed", folder / "quarantine.jsonl", folder / "lengths.csv")


def run(data: DataConfig, folder: Path):
    return prepare(data, make_tokenizer(TEMPLATES["mistral"]), 1024, outputs(folder))


def ids(folder: Path, split: str) -> list[str]:
    loaded = load_split(folder / "processed", split)
    return [loaded.row_id(i) for i in range(len(loaded))]


def conversations(count: int) -> list[Conversation]:
    return [Conversation("f", i, (), None, (), f"prompt {i // 2}", f"row {i}") for i in range(count)]


def test_splits_by_hash_keep_prompts_together_and_rows_in_their_place(tmp_path):
    data = settings(tmp_path)
    rows = conversations(2000)
    few, all_of_them = split_rows(rows[:1000], data), split_rows(rows, data)
    for name, taken in few.items():
        assert set(taken) <= set(all_of_them[name])  # adding rows moves no old row
        assert [row.line for row in taken] == sorted(row.line for row in taken)
        assert all(count == 2 for count in Counter(row.prompt_key for row in taken).values())
    assert 300 < len(all_of_them["test"]) < 500
    assert 300 < len(all_of_them["validation"]) < 500
    data.files = SplitFiles("a", "b", "c")
    assert split_rows(rows, data)["train"] == rows


def test_max_rows_takes_rows_by_hash_in_their_order():
    rows = conversations(1000)
    few, more = take_rows(rows, 50), take_rows(rows, 100)
    assert (len(few), len(more)) == (50, 100)
    assert set(few) < set(more)
    assert [row.line for row in more] == sorted(row.line for row in more)
    assert [row.line for row in few] != list(range(50))  # not simply the first
    assert take_rows(rows, None) == rows


def test_a_text_file_is_cut_at_line_ends_without_a_loss(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    splits = split_text(Document("t.txt", 1, text, ends=False), settings(tmp_path))
    assert "".join(splits[name][0].text for name in ("train", "validation", "test")) == text
    assert splits["test"][0].text.startswith(f"line {splits['test'][0].line - 1}\n")
    assert 0.19 < len(splits["test"][0].text) / len(text) < 0.21


def test_duplicates_and_leaks_name_the_row_that_they_repeat():
    quarantine = Quarantine()
    rows = conversations(4)
    kept = remove_duplicates([*rows, rows[1]], quarantine)
    assert kept == rows
    assert remove_leaks(rows[1:], rows[:1], quarantine) == rows[2:]
    assert [bad.detail for bad in quarantine.rows] == ["the same as f:1", "its prompt is that of f:0"]


def test_what_is_written_and_counted(tmp_path):
    write_rows(tmp_path / "train.jsonl", [raw(0), raw(0, 1), raw(0), raw(1), {"instruction": "x"}])
    write_rows(tmp_path / "valid.jsonl", [raw(2), raw(1, 5), raw(2)])
    write_rows(tmp_path / "test.jsonl", [raw(3) | {"references": ["A", "B"]}, raw(4)])
    data = settings(tmp_path, files=SplitFiles("train.jsonl", "valid.jsonl", "test.jsonl"), max_bad_share=0.7)
    metrics = run(data, tmp_path)
    assert ids(tmp_path, "train") == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:4"]
    assert ids(tmp_path, "validation") == ["valid.jsonl:1"]
    assert ids(tmp_path, "general") == ["general/general.jsonl:1#1"]
    test = load_split(tmp_path / "processed", "test")
    assert test.references(0) == ["Answer 3.0", "A", "B"]
    assert test.prompt(0) == "<s>[INST] Question 3[/INST]"
    assert metrics["quarantined"] == dict.fromkeys(metrics["quarantined"], 0) | {
        "duplicate": 2, "missing_field": 1, "prompt_in_train": 1,
    }  # fmt: skip
    assert (metrics["num_raw_rows"], metrics["num_quarantined"]) == (11, 4)
    # 1 begin, 1 [INST], 11 bytes, 1 [/INST], then 11 bytes (with the space) and the end token
    assert metrics["train"] == {
        "num_rows": 3, "num_tokens": 78, "num_supervised_tokens": 36, "supervised_share": round(36 / 78, 6),
        "length_p50": 26, "length_p95": 26, "length_max": 26,
        "num_too_long_dropped": 0, "num_too_long_truncated": 0, "num_unrolled": 0,
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"], row["reason"]) for row in lines] == [
        ("train.jsonl", 3, "duplicate"), ("train.jsonl", 5, "missing_field"),
        ("valid.jsonl", 2, "prompt_in_train"), ("valid.jsonl", 3, "duplicate"),
    ]  # fmt: skip


def test_equal_input_gives_equal_bytes(tmp_path):
    write_rows(tmp_path / "train.jsonl", [raw(i) for i in range(200)])
    data = settings(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run(data, tmp_path / name)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 6
    for file in files:
        content = (tmp_path / "a" / file).read_bytes()
        assert content == (tmp_path / "b" / file).read_bytes(), file
        assert str(tmp_path).encode() not in content
    data.max_rows = 5
    metrics = run(data, tmp_path / "b")
    assert metrics["train"]["num_rows"] == 5
    assert (tmp_path / "a/processed/train.arrow").read_bytes() != (tmp_path / "b/processed/train.arrow").read_bytes()
    assert (tmp_path / "a/processed/test.arrow").read_bytes() == (tmp_path / "b/processed/test.arrow").read_bytes()


def test_too_many_bad_rows_fail_and_leave_the_quarantine(tmp_path):
    lines = [json.dumps(raw(i)) for i in range(20)] + ["{broken", json.dumps(raw(21) | {"output": "a</s>b"})]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"train.jsonl: 2 of 22 rows cannot be used \(9.1 %\)") as error:
        run(settings(tmp_path, max_bad_share=0.05), tmp_path)
    assert "train.jsonl:21: bad_json" in str(error.value)
    assert "train.jsonl:22: control_token: messages[1].content holds the control token </s>" in str(error.value)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "processed").exists()
    assert run(settings(tmp_path, max_bad_share=0.1), tmp_path)["num_quarantined"] == 2


def test_the_policies_for_rows_that_are_too_long(tmp_path):
    long_prompt = raw(100) | {"input": "word " * 100}
    long_answer = raw(101) | {"output": "word " * 100}
    write_rows(tmp_path / "train.jsonl", [*(raw(i) for i in range(20)), long_prompt, long_answer])
    data = settings(tmp_path, max_bad_share=0.0)
    metrics = run(data, tmp_path)
    count = lambda key: sum(metrics[name][key] for name in ("train", "validation", "test"))
    assert (count("num_rows"), count("num_too_long_dropped"), metrics["num_quarantined"]) == (20, 2, 0)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert reasons == ["too_long", "too_long"]
    data.too_long = TooLong.truncate_prompt
    metrics = run(data, tmp_path)
    assert (count("num_rows"), count("num_too_long_dropped"), count("num_too_long_truncated")) == (21, 1, 1)
    data.too_long = TooLong.error
    with pytest.raises(
        DataError, match=r"2 rows have more than data.max_length=200 tokens.*\n  train.jsonl:21: 5\d\d tokens"
    ):
        run(data, tmp_path)


def test_settings_that_do_not_fit_are_named(tmp_path):
    write_rows(tmp_path / "train.jsonl", [raw(i) for i in range(20)])
    with pytest.raises(ConfigError, match=r"data.max_length: 2000 is over the model's context of 1024"):
        run(settings(tmp_path, max_length=2000), tmp_path)
    with pytest.raises(ConfigError, match=r"data.system_prompt: .*Only user and assistant"):
        run(settings(tmp_path, system_prompt="Be kind."), tmp_path)
    columns = Columns(**{name: name for name in NAMES} | {"output": "outputs"})
    with pytest.raises(
        ConfigError, match=r"no column 'outputs'; it has input, instruction, output.*columns.output=output"
    ):
        run(settings(tmp_path, columns=columns), tmp_path)
    with pytest.raises(ConfigError, match=r"is not the file that data.path names"):
        run(
            settings(tmp_path, path=str(tmp_path / "train.jsonl"), files=SplitFiles("other.jsonl", None, None)),
            tmp_path,
        )
    with pytest.raises(DataError, match=r"no such file"):
        run(settings(tmp_path, path=str(tmp_path / "nowhere")), tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty.jsonl: has no rows"):
        run(settings(tmp_path, files=SplitFiles("empty.jsonl", None, None)), tmp_path)
    with pytest.raises(DataError, match=r"validation: no row split off train.jsonl by data.validation_share is left"):
        run(settings(tmp_path, validation_share=0.0), tmp_path)
    assert run(settings(tmp_path, path=str(tmp_path / "train.jsonl")), tmp_path)["num_raw_rows"] == 21


def test_text_files_and_text_rows(tmp_path):
    text = "".join(f"Line number {i}.\n" for i in range(100))
    (tmp_path / "book.txt").write_text(text + "a </s> b\n")
    data = settings(tmp_path, shape=Shape.text, files=SplitFiles("book.txt", None, None), max_length=50, text_overlap=5)
    metrics = run(data, tmp_path)
    assert metrics["quarantined"]["control_token"] == 1  # that line alone
    split = load_split(tmp_path / "processed", "train")
    tokenizer = make_tokenizer(TEMPLATES["mistral"])
    again = "".join(tokenizer.decode(split.input_ids(i)[0 if i == 0 else 5 :]) for i in range(len(split)))
    assert text.startswith(again)
    assert len(again) > 0.59 * len(text)
    write_rows(tmp_path / "texts.jsonl", [{"text": f"Document {i}"} for i in range(20)])
    metrics = run(settings(tmp_path, shape=Shape.text, files=SplitFiles("texts.jsonl", None, None)), tmp_path)
    split = load_split(tmp_path / "processed", "train")
    assert split.input_ids(0)[-1] == tokenizer.eos_token_id  # a document ends
    general = load_split(tmp_path / "processed", "general")
    assert general.input_ids(0)[-1] != tokenizer.eos_token_id  # a general text may stop anywhere
    with pytest.raises(ConfigError, match=r"data.max_rows: a .txt file has no rows"):
        run(settings(tmp_path, shape=Shape.text, files=SplitFiles("book.txt", None, None), max_rows=5), tmp_path)
    with pytest.raises(ConfigError, match=r"set data.shape=text"):
        run(settings(tmp_path, files=SplitFiles("book.txt", None, None)), tmp_path)


def test_a_new_system_prompt_moves_no_row(tmp_path):
    write_rows(tmp_path / "train.jsonl", [raw(i) for i in range(50)])
    rows = {}
    for prompt in (None, "Be kind."):
        prepare(
            settings(tmp_path, system_prompt=prompt),
            make_tokenizer(TEMPLATES["chatml"], "chatml"),
            None,
            outputs(tmp_path),
        )
        rows[prompt] = ids(tmp_path, "test")
    assert rows[None] == rows["Be kind."]
    assert "Be kind." in load_split(tmp_path / "processed", "test").prompt(0)


def test_the_histogram_counts_every_row(tmp_path):
    write_rows(tmp_path / "train.jsonl", [raw(i) for i in range(50)])
    metrics = run(settings(tmp_path), tmp_path)
    lines = [line.split(",") for line in (tmp_path / "lengths.csv").read_text().splitlines()]
    assert lines[0] == ["length", "count", "split"]
    for name in ("train", "validation", "test", "general"):
        assert sum(int(count) for _, count, split in lines[1:] if split == name) == metrics[name]["num_rows"]
    edges = [int(length) for length, _, split in lines[1:] if split == "train"]
    assert set(np.diff(edges)) == {8}
    assert edges[0] == 0
    assert length_histogram({"train": []}, 16).splitlines()[1:] == [f"{i},0,train" for i in range(17)]
