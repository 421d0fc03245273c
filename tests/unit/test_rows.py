"""Reading raw files: every format, and every way in which a row can be bad, by file and line."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.conversations import Conversation, Document, check_columns, parse_row
from pipeline.errors import ConfigError, DataError
from pipeline.quarantine import Quarantine
from pipeline.rows import BadRow, RawRow, Reason, read_hub_rows, read_rows
from pipeline.schema import Columns, DataConfig, Shape, SplitFiles

NAMES = ("instruction", "input", "output", "prompt", "completion", "messages", "text", "references", "system")
ROWS = [
    {"instruction": "Add.", "input": "1, 2", "output": "3 €"},
    {"instruction": 'Say\n"hi"', "input": "", "output": "hi"},
]


def settings(shape: Shape = Shape.instruction, **columns: str) -> DataConfig:
    return DataConfig(
        shape=shape, columns=Columns(**{name: name for name in NAMES} | columns), system_prompt=None, hub_id=None,
        files=SplitFiles(train="train.jsonl", validation=None, test=None),
    )  # fmt: skip


def read(path: Path) -> list[RawRow | BadRow]:
    return list(read_rows(path, path.name))


def write(path: Path, rows: list[dict]) -> None:
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    match plain.suffix:
        case ".jsonl":
            plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case ".json":
            plain.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
        case ".csv":
            with plain.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), plain)
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()


def test_a_number_of_thousands_of_digits_is_a_bad_row(tmp_path):
    text = json.dumps(ROWS[0]) + '\n{"a": ' + 5000 * "1" + "}\n"
    (tmp_path / "a.jsonl").write_text(text)
    good, bad = read(tmp_path / "a.jsonl")
    assert isinstance(good, RawRow)
    assert (bad.line, bad.reason) == (2, Reason.bad_json)
    (tmp_path / "a.json").write_text('[{"a": ' + 5000 * "1" + "}]")
    with pytest.raises(DataError, match=r"a\.json:1: not valid JSON"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(("header", "said"), [('"a,b\n1,2\n', "cannot be read"), ("a,b,a\n1,2,3\n", "twice \\(a\\)")])
def test_a_csv_header_that_cannot_be_right_is_refused(tmp_path, header, said):
    (tmp_path / "a.csv").write_text(header)
    with pytest.raises(DataError, match=said):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("compressed", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix, compressed):
    path = tmp_path / f"data{suffix}{compressed}"
    write(path, ROWS)
    assert [row.fields for row in read(path)] == ROWS
    assert {row.file for row in read(path)} == {path.name}


def test_lines_are_those_of_the_file(tmp_path):
    lines = {}
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        write(tmp_path / f"data{suffix}", [*ROWS, ROWS[0]])
        lines[suffix] = [row.line for row in read(tmp_path / f"data{suffix}")]
    # JSON: five lines a row after the bracket; CSV: after the header, the second row has a line break in it
    assert lines == {".jsonl": [1, 2, 3], ".json": [2, 7, 12], ".csv": [2, 3, 5], ".parquet": [1, 2, 3]}


def test_bad_lines_of_jsonl_cost_one_row_each(tmp_path):
    path = tmp_path / "data.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(
        b"\xef\xbb\xbf"
        + good
        + b'{"text": "cut\n'
        + b'{"text": "\xff\xfe"}\n'
        + b"\n"
        + b"[1, 2]\n"
        + b'{"text": "\\ud800"}\n'
        + good
    )
    rows = read(path)
    found = [(row.line, str(row.reason) if isinstance(row, BadRow) else "good") for row in rows]
    assert found == [
        (1, "good"), (2, "bad_json"), (3, "bad_encoding"), (5, "wrong_type"), (6, "bad_encoding"), (7, "good"),
    ]  # fmt: skip
    assert "column" in rows[1].detail
    assert rows[2].detail == "byte 11 of the line is not UTF-8"
    assert "\\xff" in rows[2].excerpt


def test_bad_rows_of_csv(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b'a,b\n1,2\n1\n1,2,3\n"x"y,2\n\xff,2\n\n1,"2\n3"\n4,5\n')
    found = [(row.line, str(row.reason) if isinstance(row, BadRow) else row.fields["a"]) for row in read(path)]
    assert found == [(2, "1"), (3, "bad_csv"), (4, "bad_csv"), (5, "bad_csv"), (6, "bad_encoding"), (8, "1"), (10, "4")]
    path.write_text('a,b\n1,2\n3,"4\n5,6\n')
    with pytest.raises(DataError, match=r"data.csv:3: a quote that opens here is never closed"):
        read(path)


def test_a_json_array_that_breaks_off_is_refused_with_its_line(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[\n{"a": 1},\n{"a": }\n]')
    with pytest.raises(DataError, match=r"data.json:3: not valid JSON"):
        read(path)
    path.write_text('[{"a": 1}\n{"a": 2}]')
    with pytest.raises(DataError, match=r"expecting ',' or ']'"):
        read(path)
    path.write_text('[{"a": 1}, {"a": 2}')
    with pytest.raises(DataError, match=r"not valid JSON"):
        read(path)
    path.write_text('{"a": 1}\n{"a": 2}\n')  # JSON lines under the wrong suffix
    assert [row.fields["a"] for row in read(path)] == [1, 2]


def test_files_that_cannot_be_read_are_named(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"trian.jsonl: no such file. Did you mean train.jsonl\?"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(ConfigError, match=r"unknown format"):
        read(tmp_path / "train.xlsx")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-30])
    with pytest.raises(DataError, match=r"damaged gzip"):
        read(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"damaged gzip"):
        read(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"damaged Parquet"):
        read(tmp_path / "a.parquet")


def test_plain_text_gives_its_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes("One\n\nTwo é\n".encode() + b"\xff\n" + b"end")
    rows = read(tmp_path / "a.txt")
    assert [row.fields["text"] for row in rows if isinstance(row, RawRow)] == ["One\n", "\n", "Two é\n", "end"]
    assert [(row.line, row.reason) for row in rows if isinstance(row, BadRow)] == [(4, Reason.bad_encoding)]


def parse(fields: dict, shape: Shape = Shape.instruction, **columns: str):
    return parse_row(RawRow("f", 7, fields), settings(shape, **columns))


def test_the_four_shapes():
    row = parse({"q": "Add.", "input": "1, 2", "output": "3"}, instruction="q")
    assert isinstance(row, Conversation)
    assert row.messages == ({"role": "user", "content": "Add.\n1, 2"}, {"role": "assistant", "content": "3"})
    assert row.row_id == "f:7"
    assert row.references == ("3",)
    row = parse({"prompt": "Hi", "completion": "Yes", "system": "Be kind."}, Shape.prompt_completion)
    assert [m["content"] for m in row.messages] == ["Be kind.", "Hi", "Yes"]
    chat = [{"role": "user", "content": "Hi", "tool_calls": None}, {"role": "assistant", "content": "Yes"}]
    row = parse({"messages": chat}, Shape.messages)
    assert row.messages[0] == {"role": "user", "content": "Hi"}
    row = parse({"messages": json.dumps(chat)}, Shape.messages)  # a CSV's cell
    assert len(row.messages) == 2
    row = parse({"text": "Some text"}, Shape.text)
    assert isinstance(row, Document)
    assert row.ends


def test_references_are_kept_and_stand_in_for_a_missing_output():
    fields = {"instruction": "Say.", "references": ["A", "B", "A"]}
    assert parse(fields).messages[-1]["content"] == "A"
    assert parse(fields).references == ("A", "B")
    assert parse(fields | {"output": "C"}).references == ("C", "A", "B")
    assert parse(fields | {"output": "B"}).references == ("A", "B")


def test_arguments_of_calls_become_objects_and_trailing_turns_go():
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "user", "content": "x"},
    ]
    row = parse({"messages": chat}, Shape.messages)
    function = {"name": "f", "arguments": {"a": 1}}
    assert row.messages[-1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "1", "function": function}],
    }


@pytest.mark.parametrize(
    ("fields", "shape", "reason", "detail"),
    [
        ({"instruction": "a"}, Shape.instruction, Reason.missing_field, "no 'output'"),
        ({"instruction": "a", "output": None}, Shape.instruction, Reason.missing_field, "no 'output'"),
        ({"instruction": "a", "output": " \n"}, Shape.instruction, Reason.empty_field, "'output' is empty"),
        ({"instruction": "", "output": "b"}, Shape.instruction, Reason.empty_field, "'instruction' is empty"),
        ({"instruction": "a", "output": 5}, Shape.instruction, Reason.wrong_type, "'output' must be a text, it is 5"),
        ({"instruction": "a", "input": [], "output": "b"}, Shape.instruction, Reason.wrong_type, "'input' must be"),
        ({"instruction": "a", "output": "b", "references": "c"}, Shape.instruction, Reason.wrong_type, "list"),
        ({"messages": []}, Shape.messages, Reason.empty_field, "'messages' is empty"),
        ({"messages": "hi"}, Shape.messages, Reason.wrong_type, "list"),
        ({"messages": [{"from": "human"}]}, Shape.messages, Reason.missing_field, "no 'role' (it has from)"),
        ({"messages": [{"role": "gpt", "content": "a"}]}, Shape.messages, Reason.wrong_type, "known are system"),
        ({"messages": [{"role": "user"}]}, Shape.messages, Reason.missing_field, "messages[0] has no 'content'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, Shape.messages, Reason.wrong_type, "must be a text"),
        ({"messages": [{"role": "user", "content": "a"}]}, Shape.messages, Reason.nothing_to_supervise, "no assistant"),
        ({"text": ""}, Shape.text, Reason.empty_field, "'text' is empty"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(fields, shape, reason, detail):
    row = parse(fields, shape)
    assert isinstance(row, BadRow)
    assert (row.file, row.line, row.reason) == ("f", 7, reason)
    assert detail in row.detail


def test_an_unknown_column_is_named_beside_those_that_exist():
    found = ["question", "output", "input"]
    with pytest.raises(
        ConfigError, match=r"no column 'questions'; it has input, output, question.*columns.instruction=question"
    ):
        check_columns(found, settings(instruction="questions"), "f")
    check_columns(found, settings(instruction="question"), "f")
    check_columns(["instruction", "output"], settings(), "f")  # `input` may be absent under its own name
    with pytest.raises(ConfigError, match=r"data.columns.input"):
        check_columns(
            ["instruction", "output"], settings(input="context"), "f"
        )  # but a name that someone gave must exist
    check_columns(["instruction", "references"], settings(), "f")


def test_the_quarantine_refuses_too_large_a_share_of_any_file(tmp_path):
    quarantine = Quarantine()
    quarantine.num_rows.update({"a.jsonl": 1000, "b.jsonl": 10})
    for line in (1, 2):
        quarantine.add(BadRow("b.jsonl", line, Reason.bad_json, "broken"))
    for line in range(3, 10):
        quarantine.add(BadRow("b.jsonl", line, Reason.too_long, "900 tokens"))
    quarantine.check(0.2, tmp_path / "q.jsonl")
    with pytest.raises(DataError) as error:
        quarantine.check(0.1, tmp_path / "q.jsonl")
    message = str(error.value)
    for part in (
        "b.jsonl: 2 of 10 rows cannot be used (20.0 %): bad_json 2",
        "b.jsonl:1: bad_json: broken",
        "q.jsonl",
        "0.1",
    ):
        assert part in message
    assert "too_long" not in message
    quarantine.write(tmp_path / "q.jsonl")
    first = json.loads((tmp_path / "q.jsonl").read_text().splitlines()[0])
    assert first == {"file": "b.jsonl", "line": 1, "reason": "bad_json", "detail": "broken", "excerpt": ""}


def test_a_hub_data_set_is_loaded_at_its_revision(tmp_path, monkeypatch):
    import datasets

    write(tmp_path / "train.jsonl", ROWS)
    load, asked = datasets.load_dataset, {}

    def from_folder(path, **options):  # the outermost edge: where the files come from
        asked.update(options, path=path)
        return load(str(tmp_path), split=options["split"], cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    data = settings()
    data.hub_id, data.hub_config, data.revision = "owner/name", None, "a" * 40
    rows = list(read_hub_rows(data, "train"))
    assert [row.fields for row in rows] == ROWS
    assert [(row.file, row.line) for row in rows] == [("owner/name/train", 1), ("owner/name/train", 2)]
    assert (asked["path"], asked["revision"]) == ("owner/name", "a" * 40)
    with pytest.raises(DataError, match=r"split 'trian'.*cannot be loaded"):
        list(read_hub_rows(data, "trian"))


def test_a_hub_that_is_out_of_reach_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    data = settings()
    data.hub_id, data.hub_config, data.revision = "owner/name", None, "a" * 40
    with pytest.raises(DataError, match=r"data.hub_id: owner/name at a+, split 'train', cannot be loaded"):
        list(read_hub_rows(data, "train"))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"is a folder here"):
        list(read_hub_rows(data, "train"))
