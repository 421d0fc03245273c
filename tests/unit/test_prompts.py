"""Prompts of raw rows are those that training saw."""

import json

import pytest

from pipeline.config import compose_config
from pipeline.dataset import load_split
from pipeline.generate import read_prompts
from pipeline.preparation import Outputs, prepare
from pipeline.prompts import PromptEncoder
from pipeline.rows import RawRow
from tests.chat_templates import TEMPLATES, make_tokenizer

CHATS = [
    {"messages": [{"role": "user", "content": f"Question {i}"}, {"role": "assistant", "content": "First."},
                  {"role": "user", "content": "And then?"}, {"role": "assistant", "content": f"Answer {i}."}],
     **({"system": "Be brief."} if i % 2 else {})}
    for i in range(4)
]  # fmt: skip
CLAUSES = [
    {"instruction": f"Summarise {i}.", "input": "" if i else "A clause.", "output": f"Short {i}."} for i in range(4)
]


@pytest.mark.parametrize("kind", ["chatml", "llama3", "qwen3", "gemma3", "mistral", None])
@pytest.mark.parametrize(("shape", "rows"), [("instruction", CLAUSES), ("messages", CHATS)])
def test_prompts_are_those_of_prepare(tmp_path, kind, shape, rows):
    """Of raw rows with their answers, and of the same as a user would type them; plain text is something else."""
    if kind == "mistral" and shape == "messages":
        rows = [{"messages": row["messages"]} for row in rows]  # its template takes no system message
    tokenizer = make_tokenizer(TEMPLATES[kind], kind) if kind else make_tokenizer(TEMPLATES["chatml"], "chatml")
    for i, name in enumerate(("train", "validation", "test")):
        text = "".join(json.dumps(row).replace("Question", f"Q{i}").replace("Summ", f"S{i}") + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "general.jsonl").write_text('{"text": "Words."}\n')
    data = compose_config(
        [f"data.path={tmp_path}", f"data.shape={shape}", f"data.general_path={tmp_path}/general.jsonl",
         *(["data.system_prompt=Speak plainly."] if kind is None else [])]
    ).data  # fmt: skip
    prepare(data, tokenizer, None, Outputs(tmp_path, tmp_path / "quarantine.jsonl", tmp_path / "lengths.csv"))
    split = load_split(tmp_path, "test")
    trained = {split.row_id(i).partition("#")[0]: i for i in range(len(split))}  # the last turn of an unrolled row
    assert len(trained) == 4
    encoder = PromptEncoder(data, tokenizer, None)
    for row in read_prompts(tmp_path / "test.jsonl"):
        i = trained[f"test.jsonl:{row.line}"]
        asked = [encoder.encode(row)]
        if shape == "messages":
            fields = {**row.fields, "messages": row.fields["messages"][:-1]}
            asked.append(encoder.encode(RawRow("typed", 1, fields)))
        else:
            question = "\n".join(filter(None, (row.fields["instruction"], row.fields["input"])))
            asked.append(encoder.encode(RawRow("typed", 1, {"prompt": question})))
        for prompt in asked:
            assert prompt.ids.tolist() == split.prompt_ids(i).tolist()
            assert prompt.text == split.prompt(i)
            assert prompt.end_id == split.input_ids(i)[-1]
        if shape == "instruction":
            plain = PromptEncoder(data, tokenizer, None, plain=True).encode(RawRow("typed", 1, {"prompt": question}))
            assert plain.ids.tolist() != split.prompt_ids(i).tolist()
            other = PromptEncoder(data, tokenizer, None, system="Shout.") if kind != "mistral" else None
            assert other is None or other.encode(row).ids.tolist() != split.prompt_ids(i).tolist()
